"""Which model to use: the argument, else LARP_MLLM_MODEL, else the newest one trained here."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path

POINTER = "newest.json"


def home() -> Path:
    """The folder of the pointer to the newest model: LARP_MLLM_HOME, by default ~/.cache/larp-mllm."""
    return Path(os.environ.get("LARP_MLLM_HOME") or Path.home() / ".cache" / "larp-mllm")


def remember_newest(model: str | Path) -> Path:
    """Point `generate` without a model at this folder from now on; returns the pointer file."""
    pointer = home() / POINTER
    pointer.parent.mkdir(parents=True, exist_ok=True)
    written = datetime.now(UTC).isoformat(timespec="seconds")
    part = pointer.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({"model": str(Path(model).resolve()), "written": written}, indent=2) + "\n")
    part.replace(pointer)
    return pointer


def find_model(model: str | Path | None = None) -> Path:
    """The folder to load. Raises ValueError that names the three ways to choose one when there is none."""
    pointer = home() / POINTER
    if model is not None:
        chosen, by = Path(model), "model="
    elif os.environ.get("LARP_MLLM_MODEL"):
        chosen, by = Path(os.environ["LARP_MLLM_MODEL"]), "LARP_MLLM_MODEL="
    elif pointer.is_file():
        chosen, by = Path(json.loads(pointer.read_text())["model"]), f"{pointer}: "
    else:
        raise ValueError(f"no language model with video vocabulary was trained on this machine. {_ways()}")
    if not (chosen / "config.json").is_file():
        raise ValueError(f"{by}{chosen}: no model folder (config.json is missing). {_ways()}")
    return chosen


def _ways() -> str:
    return (
        "Give one as model=FOLDER (--model on the command line), or in the environment variable LARP_MLLM_MODEL, or "
        "train one with training/train_mllm.py, which is then found by itself; `make quickstart` trains a small one"
    )
