"""Checkpoints that a stranger may have written, or damaged: their files are read as data, and never run code.

DeepSpeed reads its own files with weights_only=False, which runs whatever a pickle names.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from larp.config import is_whole

import torch

_VARIABLE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# What a checkpoint with other contents than ours makes the code raise that loads it.
_DAMAGE = (KeyError, TypeError, AttributeError, IndexError, RuntimeError, AssertionError, EOFError, OverflowError)


@contextmanager
def only_data(*classes: type) -> Iterator[None]:
    """In the block, torch.load builds tensors, plain values and these classes, even where it is asked for more.

    For other objects it raises pickle.UnpicklingError.
    """
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = "1"
    try:
        with torch.serialization.safe_globals(list(classes)):
            yield
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before


@contextmanager
def naming_damaged(folder: Path) -> Iterator[None]:
    """In the block, what a damaged or malicious checkpoint raises while it is loaded becomes a ValueError that names its folder."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = (
            "is damaged" if found is None else f"holds more than tensors and numbers ({found[1]}), which could run code"
        )
        raise ValueError(
            f"{folder} {what}: no training wrote it so; copy the run again, or train anew from its model with --start-from"
        ) from error
    except (*_DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        text = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"{folder} is damaged ({type(error).__name__}: {text[0][:200]}): delete it to go on from the checkpoint before, or copy the "
            "run again"
        ) from error


def checked_marker(marker: Any, path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's marker, read from `path`. Raises ValueError for one that no training has written."""
    fields = marker if isinstance(marker, dict) else {}
    wrong = [name for name, is_right in _MARKER_FIELDS.items() if not is_right(fields.get(name))]
    if wrong:
        raise ValueError(
            f"{path} is damaged: {wrong[0]} is {str(fields.get(wrong[0]))[:80]!r}; delete {path.parent} to go on from the checkpoint "
            "before, or copy the run again"
        )
    return fields


def _are_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(is_whole(count) and count >= 0 for count in value.values())


_MARKER_FIELDS = {
    "step": lambda value: is_whole(value) and value >= 0,
    "world_size": lambda value: is_whole(value) and value >= 1,
    "zero_stages": _are_counts,
    "model": lambda value: isinstance(value, dict),
    "loader_state": lambda value: isinstance(value, dict),
    "files": _are_counts,
}
