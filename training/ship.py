"""Write trained models into larp_mllm/shipped, as they come with the package: small, and for inference alone.

    python training/ship.py --tokenizer runs/box/tokenizer/model --generator runs/box/generator/model --mllm runs/box/mllm/model

Weights are stored in bfloat16, averaged ones where there are some. The tokenizer loses its prior, which only its training uses, and so
has another hash; generator and language model, which must have been trained on its codes, take over that hash and share the tokenizer.
"""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from larp.config import parse
from larp.engine.generator_run import RECORD, find_training
from larp.engine.signals import run_script
from larp.files import read_json, write_json
from larp.hub import WEIGHTS, averaged
from larp.models.generator import LarpGenerator
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp_mllm.locate import TRAINING, find_model, read_config

import torch
from safetensors.torch import load_file, save_file

_NOT_SHIPPED = ("video_tokenizer", WEIGHTS)


@dataclass(frozen=True)
class ShipConfig:
    """Write trained models into the package."""

    tokenizer: Path = Path("runs/tokenizer/model")
    """Folder of the tokenizer."""
    generator: Path = Path("runs/generator/model")
    """Folder of a class-conditional generator of its codes."""
    mllm: Path = Path("runs/mllm")
    """Folder of a language model of its codes, or of its run."""
    out: Path = Path(__file__).parents[1] / "larp_mllm" / "shipped"
    """Folder to write to."""


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`, by default the program's own; ValueError for models that do not belong together."""
    config, _ = parse(ShipConfig, sys.argv[1:] if argv is None else argv, Path(__file__).parent, "ship.py")
    trained = LarpTokenizer.from_pretrained(config.tokenizer, variant=averaged(config.tokenizer))
    generator = LarpGenerator.from_pretrained(config.generator, variant=averaged(config.generator))
    mllm = find_model(config.mllm, "--mllm")
    settings = read_json(mllm / "config.json")
    for name, found in (("generator", generator.config.tokenizer_hash), ("mllm", settings["video_tokenizer_hash"])):
        if found != trained.weight_hash():
            raise ValueError(
                f"--{name} was trained on codes of the tokenizer {found[:12]}, but --tokenizer is {trained.weight_hash()[:12]}: give "
                "models that belong together"
            )
    folder = without_prior(trained).save_pretrained(config.out / "tokenizer", dtype=torch.bfloat16)
    new = LarpTokenizer.from_pretrained(folder).weight_hash()
    generator.config = replace(generator.config, tokenizer_hash=new)
    generator.save_pretrained(config.out / "generator", dtype=torch.bfloat16)
    training = find_training(str(config.generator))
    write_json(
        config.out / "generator" / RECORD, {"tokenizer": "../tokenizer", "fps": training.fps, "stride": training.stride}
    )
    write_mllm(mllm, config.out / "language-model", new)
    for path in sorted(config.out.rglob("*.safetensors")):
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


def without_prior(tokenizer: LarpTokenizer) -> LarpTokenizer:
    """Return a tokenizer with the same codes that has no prior."""
    small = LarpTokenizer(replace(tokenizer.config, prior=PriorConfig(enabled=False)))
    small.load_state_dict({k: v for k, v in tokenizer.state_dict().items() if not k.startswith("prior.")})
    return small


def write_mllm(model: Path, folder: Path, tokenizer_hash: str) -> None:
    """Write a language model in bfloat16, which loads as float32, without its video tokenizer but with its hash."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns(*_NOT_SHIPPED))
    for name in ("config.json", "processor_config.json"):
        write_json(folder / name, read_json(folder / name) | {"video_tokenizer_hash": tokenizer_hash})
    if (report := read_config(folder / TRAINING)) is not None:
        write_json(folder / TRAINING, without_paths(report))
    tensors = load_file(model / WEIGHTS)
    short = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in tensors.items()}
    save_file(short, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)


def without_paths(report: dict) -> dict:
    """Return the report of a training without what names folders of the machine: only the last part of a path is left."""
    data = {
        name: values | {"data": re.sub(r"[^:+]*/", "", values["data"])} if isinstance(values, dict) else values
        for name, values in report["data"].items()
    }
    return {k: v for k, v in report.items() if k not in ("model", "samples")} | {"data": data}


if __name__ == "__main__":
    run_script("ship.py", main)
