"""Write trained models into larp_mllm/shipped, as they come with the package: small, and for inference alone.

    python training/ship.py --tokenizer runs/box/tokenizer/model --generator runs/box/generator/model --mllm runs/box/mllm/model

Of SmolLM2 (--smollm2) only what training added is written; the user fetches the base.

Weights are stored in bfloat16, averaged ones where there are some. The tokenizer loses its prior, which only its training uses, and so
has another hash; generator and language model, which must have been trained on its codes, take over that hash and share the tokenizer.
"""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from larp.config import parse
from larp.engine.generator_run import RECORD, find_training
from larp.engine.signals import run_script
from larp.files import read_json, replacing_folder, write_json
from larp.hub import WEIGHTS, averaged
from larp.models.generator import LarpGenerator
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp_mllm.locate import TRAINING, find_model, is_hub_name, read_config
from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.model.without_base import write_without_base
from larp_mllm.processing.processor import VIDEO_TOKENIZER

import torch
from safetensors.torch import load_file, save_file

_NOT_SHIPPED = (VIDEO_TOKENIZER, WEIGHTS)
SMOLLM2 = "SmolLM2-135M-Instruct"
# Folders before a name, which may hold spaces; in a sentence only those of an absolute path may.
_FOLDERS = re.compile(r"[^:+,]*/")
_FOLDERS_IN_NOTES = re.compile(r"(?:/[^:+,;()]*|[^\s:+,;()]*)/")


@dataclass(frozen=True)
class ShipConfig:
    """Write trained models into the package."""

    tokenizer: Path = Path("runs/tokenizer/model")
    """Folder of the tokenizer."""
    generator: Path = Path("runs/generator/model")
    """Folder of a class-conditional generator of its codes."""
    mllm: Path = Path("runs/mllm")
    """Folder of a language model of its codes, or of its run."""
    smollm2: Path | None = None
    """Folder of SmolLM2-135M-Instruct with partial LoRA on its codes, which is stored without its base."""
    out: Path = Path(__file__).parents[1] / "larp_mllm" / "shipped"
    """Folder to write to."""


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`, by default the program's own; ValueError for models that do not belong together."""
    config, _ = parse(ShipConfig, sys.argv[1:] if argv is None else argv, Path(__file__).parent, "ship.py")
    trained = LarpTokenizer.from_pretrained(config.tokenizer, variant=averaged(config.tokenizer))
    generator = LarpGenerator.from_pretrained(config.generator, variant=averaged(config.generator))
    given = {"mllm": config.mllm} | ({} if config.smollm2 is None else {"smollm2": config.smollm2})
    models = {name: find_model(folder, f"--{name}") for name, folder in given.items()}
    hashes = {name: read_json(folder / "config.json")["video_tokenizer_hash"] for name, folder in models.items()}
    # A refiner changes no code.
    same_codes = (trained.weight_hash(), plain(trained, refiner_width=0).weight_hash())
    for name, found in {"generator": generator.config.tokenizer_hash, **hashes}.items():
        if found not in same_codes:
            raise ValueError(
                f"--{name} was trained on codes of the tokenizer {found[:12]}, but --tokenizer is {trained.weight_hash()[:12]}: give "
                "models that belong together"
            )
    folder = plain(trained).save_pretrained(config.out / "tokenizer", dtype=torch.bfloat16)
    new = LarpTokenizer.from_pretrained(folder).weight_hash()
    generator.config = replace(generator.config, tokenizer_hash=new)
    generator.save_pretrained(config.out / "generator", dtype=torch.bfloat16)
    training = find_training(str(config.generator))
    write_json(
        config.out / "generator" / RECORD, {"tokenizer": "../tokenizer", "fps": training.fps, "stride": training.stride}
    )
    write_mllm(models["mllm"], config.out / "language-model", new)
    if "smollm2" in models:
        model = LarpMllmForCausalLM.from_pretrained(models["smollm2"])
        with replacing_folder(config.out / "smollm2") as part:
            write_without_base(model, models["smollm2"], part, SMOLLM2)
            finish(part, new)
    for path in sorted(config.out.rglob("*.safetensors")):
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


def plain(tokenizer: LarpTokenizer, **fields: Any) -> LarpTokenizer:
    """Return a tokenizer with the same codes that has no prior, nor what these `fields` of its config leave out."""
    small = LarpTokenizer(replace(tokenizer.config, prior=PriorConfig(enabled=False), **fields))
    wanted = small.state_dict().keys()
    small.load_state_dict({k: v for k, v in tokenizer.state_dict().items() if k in wanted})
    return small


def write_mllm(model: Path, folder: Path, tokenizer_hash: str) -> None:
    """Write a language model in bfloat16, which loads as float32, without its video tokenizer but with its hash.

    `folder` is replaced as a whole; after an error it is as it was before.
    """
    with replacing_folder(folder) as part:
        shutil.copytree(model, part, ignore=shutil.ignore_patterns(*_NOT_SHIPPED), dirs_exist_ok=True)
        finish(part, tokenizer_hash)
        tensors = load_file(model / WEIGHTS)
        short = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in tensors.items()}
        save_file(short, part / WEIGHTS, metadata={"format": "pt"})
        (part / WEIGHTS).chmod(0o644)


def finish(folder: Path, tokenizer_hash: str) -> None:
    """Make a copied model folder fit the tokenizer of this hash in the package, and forget the machine that it was trained on."""
    shutil.rmtree(folder / VIDEO_TOKENIZER, ignore_errors=True)
    for name in ("config.json", "processor_config.json"):
        write_json(folder / name, read_json(folder / name) | {"video_tokenizer_hash": tokenizer_hash})
    if (report := read_config(folder / TRAINING)) is not None:
        write_json(folder / TRAINING, without_paths(report))


def without_paths(report: dict) -> dict:
    """Return the report of a training without what names folders of the machine: only the last part of a path is left.

    Captions stay as they are, and so does a name OWNER/NAME of the hub.
    """
    kept = {k: v for k, v in report.items() if k not in ("model", "samples")}
    return {k: v if k == "captions" or is_hub_name(v) else _without_folders(v) for k, v in kept.items()}


def _without_folders(value: Any, pattern: re.Pattern = _FOLDERS) -> Any:
    if isinstance(value, dict):
        return {k: _without_folders(v, _FOLDERS_IN_NOTES if k == "notes" else pattern) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_folders(item, pattern) for item in value]
    return pattern.sub("", value) if isinstance(value, str) else value


if __name__ == "__main__":
    run_script("ship.py", main)
