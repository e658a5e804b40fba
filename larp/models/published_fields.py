"""Reading and checking the fields of a published config.json, and renaming its tensors."""

import math
import warnings
from collections.abc import Iterator

from larp.hub import CheckpointError

from torch import Tensor


def check_fixed(settings: dict, fixed: dict, where: str = "") -> None:
    """Raise CheckpointError for the first field of `settings` that differs from its only supported value in `fixed`."""
    for name, expected in fixed.items():
        found = settings.get(name, expected)
        if str(found).lower() != str(expected).lower():
            raise CheckpointError(
                f"published config field {where}{name} = {found!r} is not supported (only {expected!r})"
            )


def wrong_type(settings: dict, name: str, where: str, expected: str) -> CheckpointError:
    """Return the error for a published field of the wrong type."""
    return CheckpointError(f"published config field {where}{name} = {settings[name]!r}, expected {expected}")


def read_group(settings: dict, name: str, where: str = "") -> dict:
    """Return a group of fields. Raises CheckpointError if it is none."""
    if not isinstance(settings[name], dict):
        raise wrong_type(settings, name, where, "a group of fields")
    return settings[name]


def read_float(settings: dict, name: str, where: str = "") -> float:
    """Return a finite number, which may be written as text. Raises CheckpointError if it is none."""
    value = settings[name]
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise wrong_type(settings, name, where, "a number")
    return found


def read_int(settings: dict, name: str, where: str = "") -> int:
    """Return an integer, which may be written as text. Raises CheckpointError if it is none."""
    found = read_float(settings, name, where)
    if not found.is_integer():
        raise wrong_type(settings, name, where, "a whole number")
    return int(found)


def read_bool(settings: dict, name: str, where: str = "") -> bool:
    """Return a boolean, which may be written as text. Raises CheckpointError if it is none."""
    word = str(settings[name]).lower()
    if word not in ("true", "false"):
        raise wrong_type(settings, name, where, "true or false")
    return word == "true"


def warn_of_unknown(settings: dict, known: dict) -> None:
    """Warn of the fields of `settings` that are not in `known`; they are ignored.

    Not an error, because the published code ignores unknown fields and hub repositories may have some. Fields that change the
    architecture show in the tensors, which are checked strictly.
    """
    if names := sorted(unknown_fields(settings, known)):
        warnings.warn(
            f"fields of the published config that are not known here are ignored: {', '.join(names)}", stacklevel=2
        )


def unknown_fields(settings: dict, known: dict, where: str = "") -> Iterator[str]:
    """Yield the dotted names of the fields of `settings` that are not in `known`."""
    for name, value in settings.items():
        if name not in known:
            yield where + name
        elif isinstance(value, dict) and isinstance(known[name], dict):
            yield from unknown_fields(value, known[name], f"{where}{name}.")


def rename_prefix(name: str, renamed: dict[str, str]) -> str:
    """Replace the dotted prefix of a tensor name that is a key of `renamed`."""
    for old, new in renamed.items():
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    return name


def add_temporal_axis(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the patch embedding from Conv2d, which the published layout has for patches of one frame, to Conv3d."""
    weight = tensors.get("x_embedder.weight")
    return tensors | {"x_embedder.weight": weight.unsqueeze(2)} if weight is not None and weight.ndim == 4 else tensors


def remove_temporal_axis(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Invert `add_temporal_axis`."""
    weight = tensors["x_embedder.proj.weight"]
    return tensors | {"x_embedder.proj.weight": weight.squeeze(2)} if weight.shape[2] == 1 else tensors


def not_representable(name: str, value: object, why: str) -> CheckpointError:
    """Return the error for a config value that the published layout cannot represent."""
    return CheckpointError(f"{name} = {value} cannot be written in the published layout: {why}")
