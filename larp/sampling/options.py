"""The sampling options (temperature, top-k, top-p, min-p, guidance): their defaults, help texts and checks.

A config derives from one of the two classes. A command with argparse makes its arguments from their fields and docstrings.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Self

from larp.config import is_number, is_whole

# Limits within which float32 rounds no probability to 0 and no logit to infinity.
MIN_TEMPERATURE, MAX_TEMPERATURE, MIN_TOP_P, MAX_GUIDANCE = 1e-4, 1e6, 1e-6, 1000.0

CLASS_GUIDANCE = 2.0
"""Guidance scale of videos of a class where none is given: chosen by the classes of clips that the generator of the package made."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How an id is sampled from logits; a ValueError names the option that is out of range, its value and its range."""

    temperature: float = 1.0
    """Divides the logits, 1e-4 to 1e6; 0 always takes the likeliest."""
    top_k: int = 0
    """Sample among the k likeliest, of equal ones the first; 0 is off."""
    top_p: float = 1.0
    """Then sample among the likeliest that together reach this probability, 1e-6 to 1; 1 is off."""
    min_p: float = 0.0
    """Then sample among those with at least this share of the likeliest one's probability, 0 to 1; 0 is off."""

    def __post_init__(self):
        if not (
            _is_finite(self.temperature)
            and (self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE)
        ):
            raise ValueError(
                f"temperature is {self.temperature!r}; it must be a finite number: 0 (always the likeliest) or {MIN_TEMPERATURE:g} "
                f"to {MAX_TEMPERATURE:g}"
            )
        if not is_whole(self.top_k) or self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k!r}; it must be a whole number: 0 (off) or more")
        if not (_is_finite(self.top_p) and MIN_TOP_P <= self.top_p <= 1):
            raise ValueError(
                f"top_p is {self.top_p!r}; it must lie in [{MIN_TOP_P:g}, 1], where 1 is off (top_k 1 takes the likeliest)"
            )
        if not (_is_finite(self.min_p) and 0 <= self.min_p <= 1):
            raise ValueError(f"min_p is {self.min_p!r}; it must lie in [0, 1], where 0 is off")

    @classmethod
    def of(cls, source: Any, **changes: Any) -> Self:
        """Build this class from those attributes of `source` (a config, parsed arguments) that it has as fields, and `changes`."""
        found = vars(source)
        return cls(**{field.name: found[field.name] for field in fields(cls) if field.name in found} | changes)


@dataclass(frozen=True, kw_only=True)
class GuidedSampling(SamplingOptions):
    """How the codes of a clip are sampled with classifier-free guidance; ValueError as in `SamplingOptions`."""

    guidance_scale: float = 1.0
    """Scale s of classifier-free guidance, `unconditional + s * (conditional - unconditional)`, 0 to 1000; 1 is off."""
    guidance_final: float | None = None
    """Scale of the last guided code. The scale changes linearly from the first guided code to it; by default it is constant."""
    guidance_start: float = 0.0
    """No guidance before this share of a clip's codes."""
    guidance_stop: float = 1.0
    """No guidance from this share of a clip's codes on."""

    def __post_init__(self):
        super().__post_init__()
        check_guidance_scale("guidance_scale", self.guidance_scale)
        if self.guidance_final is not None:
            check_guidance_scale("guidance_final", self.guidance_final)
        start, stop = self.guidance_start, self.guidance_stop
        if not (_is_finite(start) and _is_finite(stop) and 0 <= start < stop <= 1):
            raise ValueError(
                f"guidance runs from {start} to {stop}; these are shares of the clip: 0 <= start < stop <= 1"
            )


def check_guidance_scale(name: str, scale: float) -> None:
    """Raise ValueError, with the name of the option, unless a guidance scale is a finite number from 0 to 1000."""
    if not (_is_finite(scale) and 0 <= scale <= MAX_GUIDANCE):
        raise ValueError(f"{name} is {scale!r}; it must be a finite number from 0 to {MAX_GUIDANCE:g}, where 1 is off")


def _is_finite(value: Any) -> bool:
    return is_number(value) and abs(value) < math.inf
