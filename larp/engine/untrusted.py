"""Checkpoints that a stranger may have written, or damaged: their files are read as data, and never run code.

DeepSpeed reads its own files with weights_only=False, which runs whatever a pickle names. Its files are looked through first,
because even a pickle that only makes values can make more of them than the machine has memory.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import zipfile
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


def check_contents(folder: Path) -> None:
    """Look through the torch files below the folder of a checkpoint without running or building what they hold.

    Raises ValueError for the first one that no training has written: one that names more than tensors and plain values, is no
    file of torch.save, or describes more than it holds, as a pickle does whose values contain each other again and again.
    """
    for path in sorted(folder.rglob("*.pt")):
        try:
            _check_file(path)
        except _Code as error:
            raise ValueError(
                f"{path} holds more than tensors and numbers ({error}), which could run code: no training wrote it so; copy the run "
                "again, or train anew from its model with --start-from"
            ) from error
        except (*_DAMAGE, pickle.UnpicklingError, zipfile.BadZipFile, ValueError) as error:
            # torch's message says how to load the file in spite of it.
            reason = "" if isinstance(error, pickle.UnpicklingError) else str(error).strip().partition("\n")[0][:200]
            reason = reason or type(error).__name__
            raise ValueError(
                f"{path} is damaged ({reason}): delete {folder} to go on from the checkpoint before, or copy the run again"
            ) from error


class _Code(Exception):
    """The name of something that is neither a tensor nor a plain value."""


# Classes of DeepSpeed in its checkpoints: numbers, in all of them.
_OF_DEEPSPEED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
# What torch.save and DeepSpeed name for tensors and plain values. Left out are those of torch's own list that make as much as
# they are asked for, such as bytearray; torch.load applies its list as well.
_VALUES = re.compile(
    r"torch(\.storage|\.cuda)?\.\w+Storage|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter"
    r"|torch\.(Tensor|Size|device|serialization\._get_layout|bool|b?float\d\w*|u?int\d+|complex\d+)"
    r"|collections\.OrderedDict|_codecs\.encode|(builtins|__builtin__)\.(set|complex)"
    rf"|{'|'.join(map(re.escape, _OF_DEEPSPEED))}"
)
# Values of a checkpoint, each counted as often as it is contained; a large model has 10^5. And how deep they are nested.
_MOST_VALUES, _DEEPEST = 5_000_000, 100


def _check_file(path: Path) -> None:
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
        # torch.save does not compress; entries that share their bytes could hold as much as compressed ones.
        held = path.stat().st_size
        if sum(entry.file_size for entry in entries) > held:
            raise ValueError("its parts are larger than the file")
        names = [entry.filename for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(names) != 1 or any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise ValueError("it is no file of torch.save")
        _check_pickle(file.read(names[0]))
    # On the meta device nothing of the tensors is read.
    with torch.serialization.safe_globals([(_StandIn, name) for name in _OF_DEEPSPEED]):
        content = torch.load(path, "meta", weights_only=True)
    sizes = [tensor.numel() * tensor.element_size() for tensor in _tensors(content)]
    if sum(sizes) > 16 * held:
        raise ValueError("its tensors are larger than the file")


def _check_pickle(data: bytes) -> None:
    """Follow the operations of a pickle. Its values are lists of the values that they contain, marks on the stack are None."""
    stack: list[Any] = []
    memo: dict[int, list] = {}
    strings: list[str] = []
    for operation, argument, _ in pickletools.genops(data):
        name = operation.name
        if name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            found = ".".join(strings[-2:]) if argument is None else argument.replace(" ", ".")
            if not _VALUES.fullmatch(found):
                raise _Code(found)
        if isinstance(argument, str):
            strings.append(argument)
        if "PUT" in name or name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif "GET" in name:
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(None)
        elif name == "STOP":
            _check_size(stack)
        else:
            _follow(operation, stack)


def _follow(operation: pickletools.OpcodeInfo, stack: list[Any]) -> None:
    """Apply an operation to the stack."""
    before = [kind for kind in operation.stack_before if kind not in (pickletools.markobject, pickletools.stackslice)]
    taken = []
    if len(before) < len(operation.stack_before):
        while (value := stack.pop()) is not None:
            taken.append(value)
    taken += [stack.pop() for _ in before]
    if operation.name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"):
        # Changed where it is, because the memo has it.
        whole = taken.pop()
        whole.extend(taken)
    else:
        whole = taken
    stack.extend(whole for _ in operation.stack_after)


def _check_size(stack: list[list]) -> None:
    """Raise ValueError unless the stack has one value, which contains a bounded number of others, at a bounded depth."""
    sizes: dict[int, tuple[int, int]] = {}
    begun: set[int] = set()
    todo = [(value, False) for value in stack]
    while todo:
        value, children_known = todo.pop()
        if id(value) in sizes:
            continue
        if children_known:
            children = [sizes[id(child)] for child in value]
            size, depth = 1 + sum(size for size, _ in children), 1 + max((depth for _, depth in children), default=0)
            if size > _MOST_VALUES or depth > _DEEPEST:
                raise ValueError("its values contain each other too often")
            sizes[id(value)] = size, depth
        elif id(value) in begun:
            raise ValueError("a value contains itself")
        else:
            begun.add(id(value))
            todo += [(value, True), *((child, False) for child in value)]
    if len(stack) != 1:
        raise ValueError("it holds more than one value")


class _StandIn:
    """Takes the place of a class of DeepSpeed."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, list | tuple | set):
        for entry in value:
            yield from _tensors(entry)
    elif isinstance(value, _StandIn):
        yield from _tensors(vars(value))


@contextmanager
def naming_damaged(folder: Path, *more: type[Exception]) -> Iterator[None]:
    """In the block, what a damaged or malicious checkpoint raises while it is loaded becomes a ValueError that names its folder.

    `more`: further errors that only such a checkpoint raises.
    """
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
    except (*_DAMAGE, OSError, *more) as error:
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
