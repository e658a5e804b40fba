"""Recipes in shorter runs than they were written for: what they count in steps keeps its share of the run.

A training passes these functions to `larp.config.parse`, which knows what was typed: `--steps 30` alone shortens the warm-up of its
recipe, and a warm-up that was typed beside it stays as it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from larp.engine.optimizer import OptimizerConfig

Config = TypeVar("Config")


def typed_number(typed: Mapping[str, str], option: str) -> float | None:
    """Return the positive number that was typed for an option; None where there is none, which the parser may refuse."""
    try:
        number = float(typed.get(option, "nan"))
    except ValueError:
        return None
    return number if 0 < number < float("inf") else None


def without_minutes(config: Config, lengths: Sequence[str], typed: Mapping[str, str]) -> Config:
    """Return a config without the minutes of its recipe if one of the options `lengths` was typed and `minutes` was not.

    Where a run has minutes, its steps only scale the schedules; a user who types steps means the end of the run.
    """
    return replace(config, minutes=None) if "minutes" not in typed and not typed.keys().isdisjoint(lengths) else config


def shorten(
    config: Config, counts: Sequence[str], length: float | None, written: float | None, typed: Mapping[str, str]
) -> Config:
    """Return a config whose step counts follow a shorter run in proportion.

    Whole numbers are rounded down, and are at least 1 where they were positive.

    Args:
        config: a frozen dataclass with the values of a recipe.
        counts: names of its options, such as "optimizer.warmup"; those that are None or `typed` stay.
        length: of the run, as it was typed; None or at least `written` changes nothing.
        written: length that the recipe was written for.
        typed: what was typed for each option.
    """
    if length is None or not written or length >= written:
        return config
    for name in counts:
        group, _, option = name.rpartition(".")
        part = getattr(config, group)
        if (count := getattr(part, option)) and name not in typed:
            follows = count * length / written
            if isinstance(count, int):
                # A run of one step has no room for a warm-up.
                follows = max(int(follows), 0 if length == 1 else 1)
            config = replace(config, **{group: replace(part, **{option: follows})})
    return config


def warmup_in_steps(optimizer: OptimizerConfig, steps: int, epochs: float, typed: Mapping[str, str]) -> OptimizerConfig:
    """Return an optimizer of a recipe of so many epochs for a run of so many steps, whose epochs are not known yet.

    A warm-up in epochs keeps its share of the run; one in steps is at most a tenth of it.
    """
    warmup = optimizer.warmup
    if "optimizer.warmup_epochs" in typed:
        warmup = 0
    elif optimizer.warmup_epochs:
        warmup = max(1, int(steps * optimizer.warmup_epochs / epochs))
    elif warmup:
        warmup = min(warmup, max(1, steps // 10))
    return replace(optimizer, warmup=min(warmup, steps - 1), warmup_epochs=None)
