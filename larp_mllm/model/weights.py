"""The weights of a model folder: checks before and after loading, and contexts for loading and saving."""

import copy
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from larp.hub import check_fit, is_finite, loading
from larp_mllm.locate import MODEL_TYPE, first_line, read_config

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BASE = "base.json"
"""File of a model folder that names the base which its weights lack, see without_base.py."""
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_folder(model_class: type[PreTrainedModel], folder: Path, config: PreTrainedConfig | None = None) -> None:
    """Raise ValueError unless config.json (or `config`) and the files of weights fit a model of this class.

    Also refused are pickled weights, and a peft adapter, which transformers would load in place of the model.
    """
    files = _weight_files(folder)
    if not isinstance(config, PreTrainedConfig):
        saved = read_config(folder / "config.json") or {}
        if saved.get("model_type") != MODEL_TYPE:
            raise ValueError(
                f"{folder}: config.json is missing, or not that of a {MODEL_TYPE} model: give OUT/model of a training run"
            )
        config = model_class.config_class.from_pretrained(folder)
    if files:
        _check_shapes(model_class, config, files, str(folder))


def check_finite(model: nn.Module, where: str) -> None:
    """Raise ValueError, naming the tensor, if the model holds NaN or infinity."""
    tensors = model.state_dict()
    if (name := not_finite(tensors.items())) is not None:
        half = "; or load bfloat16, if its weights exceed float16" if tensors[name].dtype == torch.float16 else ""
        raise ValueError(
            f"{where}: the tensor {name} holds NaN or infinity: copy the model again, or take an earlier checkpoint{half}"
        )


def not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, or None."""
    return next((name for name, tensor in tensors if not is_finite(tensor)), None)


def pickled_in(folder: Path) -> str | None:
    """The name of a file of pickled weights in a folder, or None."""
    return next((file.name for file in sorted(folder.iterdir()) if file.suffix in _PICKLED), None)


@contextmanager
def naming_unwritable(folder: str | Path) -> Iterator[None]:
    """In the block, errors of writing a model, such as a full disk, become a ValueError that names the folder."""
    try:
        yield
    except Exception as error:
        # On a full disk, safetensors raises its own class and tokenizers a bare Exception.
        if not isinstance(error, (OSError, SafetensorError)) and type(error) is not Exception:
            raise
        raise ValueError(
            f"{folder} cannot be written ({first_line(error)}): free space there, or choose another folder"
        ) from error


@contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """In the block, transformers and what it imports for saving print no warnings, tables or progress bars.

    One thread at a time is in such a block. bars: leave progress bars as they are.
    """
    with loading:
        yield from _quiet(bars)


def _quiet(bars: bool) -> Iterator[None]:
    level, variable = logging.get_verbosity(), "DS_ACCELERATOR"
    added = variable not in os.environ and not torch.accelerator.is_available()
    hidden = not bars and logging.is_progress_bar_enabled()
    if hidden:
        logging.disable_progress_bar()
    logging.set_verbosity_error()
    if added:
        # Saving imports deepspeed, which otherwise prints a warning that it finds no accelerator.
        os.environ[variable] = "cpu"
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if hidden:
            logging.enable_progress_bar()
        if added:
            os.environ.pop(variable, None)


def _weight_files(folder: Path) -> list[Path]:
    """The files of weights; an empty list if there are none."""
    names = [WEIGHTS] if (folder / WEIGHTS).is_file() else []
    if not names and (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{folder / INDEX} is damaged ({first_line(error)}): copy the model folder again"
            ) from error
        if wrong := [name for name in names if not str(name).endswith(".safetensors") or Path(name).name != name]:
            raise ValueError(
                f"{folder / INDEX} names {wrong[0]!r}, expected safetensors files of the same folder: copy the model folder again"
            )
    if not names and (pickled := pickled_in(folder)):
        raise ValueError(
            f"{folder} holds pickled weights ({pickled}), which can run code and are never loaded: if you trust them, "
            f"convert them to {WEIGHTS} (torch.load(..., weights_only=True), then safetensors.torch.save_file)"
        )
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter of peft (adapter_config.json), which would be loaded in place of the model: merge "
            "it into the weights, or remove the file"
        )
    return [folder / name for name in names]


def _check_shapes(model_class: type[PreTrainedModel], config: PreTrainedConfig, files: list[Path], where: str) -> None:
    """Raise ValueError unless a model of this config can be built, and its tensors have the shapes in the files.

    The model is built on "meta", since a damaged config may ask for more memory than there is. Missing and unknown
    tensors are not checked here.
    """
    # Imported here: this import triggers that of our model (see auto_classes.py), which imports this module.
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    saved: dict[str, tuple[int, ...]] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            saved |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    layers = getattr(config.text_config, "num_hidden_layers", 0)
    if layers > len(saved):
        raise ValueError(
            f"{where}: config.json says num_hidden_layers = {layers}, but there are only {len(saved)} tensors. Restore the "
            "two files that belong together"
        )
    if type(config.text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{where}: config.json says that the base is a {config.text_config.model_type}, which is no causal language model. "
            "Restore the config.json that was written with the weights"
        )
    try:
        with torch.device("meta"):
            expected = model_class(copy.deepcopy(config)).state_dict()
    except Exception as error:  # each architecture raises its own for impossible sizes
        raise ValueError(
            f"{where}: config.json describes a model that cannot be built ({first_line(error)[:200]}). Restore the config.json "
            "that was written with the weights"
        ) from error
    both = [(name, saved[name], tuple(value.shape)) for name, value in expected.items() if name in saved]
    check_fit([f"{name} has shape {found} in place of {want}" for name, found, want in both if found != want], where)
