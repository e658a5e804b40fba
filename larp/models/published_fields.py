"""Reads the fields of a published config.json: what is of the wrong type, or of a value that is not supported, is named."""

import math
import warnings
from collections.abc import Iterator

from larp.hub import CheckpointError

from torch import Tensor


def check_fixed(settings: dict, fixed: dict, where: str = "") -> None:
    """Raise CheckpointError naming the first field of `settings` that has another value than the only supported one."""
    for name, expected in fixed.items():
        found = settings.get(name, expected)
        if str(found).lower() != str(expected).lower():
            raise CheckpointError(
                f"published config field {where}{name} = {found!r} is not supported (only {expected!r})"
            )


def unreadable(settings: dict, name: str, where: str, expected: str) -> CheckpointError:
    """The error for a published field of the wrong type."""
    return CheckpointError(f"published config field {where}{name} = {settings[name]!r}, expected {expected}")


def group(settings: dict, name: str, where: str = "") -> dict:
    """Read a group of fields; CheckpointError names it if it is something else."""
    if not isinstance(settings[name], dict):
        raise unreadable(settings, name, where, "a group of fields")
    return settings[name]


def number(settings: dict, name: str, where: str = "") -> float:
    """Read a finite number that may be written as text; CheckpointError names the field if it is none."""
    value = settings[name]
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise unreadable(settings, name, where, "a number")
    return found


def whole(settings: dict, name: str, where: str = "") -> int:
    """Read a whole number as `number` does."""
    found = number(settings, name, where)
    if not found.is_integer():
        raise unreadable(settings, name, where, "a whole number")
    return int(found)


def flag(settings: dict, name: str, where: str = "") -> bool:
    """Read a boolean that may be written as a word; CheckpointError names the field if it is none."""
    word = str(settings[name]).lower()
    if word not in ("true", "false"):
        raise unreadable(settings, name, where, "true or false")
    return word == "true"


def warn_of_unknown(settings: dict, known: dict) -> None:
    """Warn of fields that this code never saw, and ignore them.

    Not an error: the published code drops fields that its constructor does not take, and a hub repository may hold some. Where
    they stand for other layers, the tensors, which are compared one by one, do not fit.
    """
    if names := sorted(unknown_fields(settings, known)):
        warnings.warn(
            f"fields of the published config that are not known here are ignored: {', '.join(names)}", stacklevel=2
        )


def unknown_fields(settings: dict, known: dict, where: str = "") -> Iterator[str]:
    """Yield the dotted names of `settings` that `known` does not have."""
    for name, value in settings.items():
        if name not in known:
            yield where + name
        elif isinstance(value, dict) and isinstance(known[name], dict):
            yield from unknown_fields(value, known[name], f"{where}{name}.")


def with_prefix(name: str, renamed: dict[str, str]) -> str:
    """Replace the beginning of a tensor name, up to a dot or its end, as the table says."""
    for old, new in renamed.items():
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    return name


def with_temporal_kernel(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the patch embedding its temporal axis: for patches of one frame the published one is a Conv2d."""
    weight = tensors.get("x_embedder.weight")
    return tensors | {"x_embedder.weight": weight.unsqueeze(2)} if weight is not None and weight.ndim == 4 else tensors


def without_temporal_kernel(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `with_temporal_kernel`."""
    weight = tensors["x_embedder.proj.weight"]
    return tensors | {"x_embedder.proj.weight": weight.squeeze(2)} if weight.shape[2] == 1 else tensors


def inexpressible(name: str, value: object, why: str) -> CheckpointError:
    """The error for a field of ours that the published layout has no place for."""
    return CheckpointError(f"{name} = {value} cannot be written in the published layout: {why}")
