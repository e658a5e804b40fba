"""Base models in GGUF files: dequantized once into a folder of the cache, which is loaded like any other base."""

import os
import shutil
from pathlib import Path

from larp.files import obey_umask, write_json
from larp.metrics.weights import cache_folder, file_sha256, writable_cache_folder
from larp_mllm.locate import first_line
from larp_mllm.model.weights import check_finite, quiet

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SOURCE = "gguf.json"
"""File of the folder that names the GGUF file."""
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def find_gguf(source: str) -> Path | None:
    """Return the GGUF file that a path means: itself, or the only one of a folder without config.json; else None."""
    path = Path(source)
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    found = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
    return found[0] if len(found) == 1 else None


def dequantize(path: Path) -> Path:
    """Return a folder with the weights of a GGUF file in bfloat16 and its text tokenizer; it is made if it does not exist.

    The folder lies in the cache folder of weights (LARP_CACHE) and is named after the file and its SHA-256.

    Raises:
        ValueError: if the package gguf is missing, the file is damaged, or its model is of another family than Llama, Mistral or Qwen.
    """
    digest = file_sha256(path)
    folder = cache_folder() / f"{path.stem}-{digest[:16]}"
    if (folder / SOURCE).is_file():
        return folder
    try:
        import gguf  # noqa: F401  (transformers reads the file with it)
    except ImportError as error:
        raise ValueError("GGUF files need the package gguf: pip install 'larp-mllm[gguf]'") from error
    writable_cache_folder()
    where = {"gguf_file": path.name, "local_files_only": True}
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(path.parent, **where)
            if config.model_type not in _FAMILIES:
                raise ValueError(f"it holds a {config.model_type}, needed is one of {', '.join(_FAMILIES)}")
            weights = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where).state_dict()
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
            # A model of its own: the loaded one refuses to be saved, since its config says that it is quantized.
            # Its config goes with every model that is trained from it, and says where the weights are from.
            model = AutoModelForCausalLM.from_config(_without_quantization(config, f"{path.name}, SHA-256 {digest}"))
            model.load_state_dict(weights)
            model.tie_weights()
            check_finite(model, "dequantized")
            model.to(torch.bfloat16).save_pretrained(part)
            tokenizer.save_pretrained(part)
            obey_umask(part)
        write_json(part / SOURCE, {"file": path.name, "sha256": digest, "stored": "dequantized, bfloat16"})
        if not (folder / SOURCE).is_file():  # else another process was faster, and may read it
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
    except Exception as error:  # transformers and gguf raise classes of their own
        reason = (str(error) if isinstance(error, ValueError) else first_line(error)).partition(": copy")[0]
        raise ValueError(f"{path} cannot be read as GGUF: {reason}. Download it again, or take another base") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _without_quantization(config, source: str):
    values = config.to_dict() | {"dequantized_from": source}
    for name in ("quantization_config", "_name_or_path"):
        values.pop(name, None)
    return type(config).from_dict(values)
