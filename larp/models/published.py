"""Saving models in the published LARP checkpoint layout (hub repositories hywang66/LARP-L-long-*).

    python -m larp.models.published runs/mine/model published/                  # a tokenizer that the published code loads
    python -m larp.models.published runs/mine/model published/ --variant ema    # its averaged weights

The layout has the same tensors under other names; `published_tokenizer` and `discriminator` convert them.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

from larp.files import replacing, write_text
from larp.hub import CONFIG, WEIGHTS, make_folder
from larp.models.discriminator import Discriminator, discriminator_to_published
from larp.models.published_tokenizer import tokenizer_to_published
from larp.models.tokenizer import LarpTokenizer

from safetensors.torch import save_file


def save_published(model: LarpTokenizer | Discriminator, folder: str | Path) -> Path:
    """Write config.json and model.safetensors in the published layout and return the folder.

    Before writing, raises CheckpointError for a config field that the layout cannot represent, and ValueError if `folder` is a
    file.
    """
    to_published = discriminator_to_published if isinstance(model, Discriminator) else tokenizer_to_published
    config, tensors = to_published(model.config, model.state_dict())
    folder = make_folder(folder)
    # Copies: safetensors rejects tensors that share memory, such as the slices of a fused weight.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(folder / WEIGHTS) as part:
        save_file(tensors, part, metadata={"format": "pt"})
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}\n{self.format_usage().strip()}")


def main(argv: list[str] | None = None) -> dict:
    """Convert a tokenizer: `python -m larp.models.published FROM TO`. Raises ValueError for invalid arguments."""
    parser = _Parser(
        prog="python -m larp.models.published", description="Write a tokenizer in the published LARP layout."
    )
    parser.add_argument("source", metavar="FROM", help="folder or hub name of a tokenizer")
    parser.add_argument("target", metavar="TO", help="folder to write to")
    parser.add_argument("--variant", help="'ema' takes the averaged weights; by default the last ones")
    arguments = parser.parse_args(argv)
    source, target = arguments.source, arguments.target
    if Path(target).exists() and Path(source).exists() and Path(target).samefile(source):
        raise ValueError(f"{target} is the folder that is read: give another output folder")
    print(f"wrote {save_published(LarpTokenizer.from_pretrained(source, variant=arguments.variant), target)}")
    return {}


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"larp.models.published: {error}", file=sys.stderr)
        sys.exit(2)
