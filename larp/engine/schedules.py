"""Learning-rate factors and ramps: pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

SCHEDULES = ("cosine", "constant", "step")


def lr_factor(
    name: str,
    total: int,
    warmup: int,
    final: float,
    milestones: Sequence[float] = (0.5, 0.75),
    gamma: float | None = None,
) -> Callable[[int], float]:
    """Return the factor on the learning rate as a function of the step, in [0, 1].

    Args:
        name: after the warm-up, "cosine" falls along half a cosine to `final` at the last step, "step" multiplies by
            `gamma` at each milestone, and "constant" stays at 1.
        total: steps of the run; later steps use the last factor.
        warmup: steps of linear warm-up.
        final: factor at the end.
        milestones: shares of the run.
        gamma: by default the value that reaches `final` at the last milestone.

    Raises ValueError for an unknown name, a warm-up that is not shorter than the run, `final` outside [0, 1], milestones
    that do not increase within (0, 1), and gamma outside (0, 1].
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule '{name}', expected one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup < max(total, 1):
        raise ValueError(
            f"warmup is {warmup} steps of a run of {total}: it must be 0 or more and shorter than the run; lower it "
            "(--optimizer.warmup), or train longer"
        )
    if not 0 <= final <= 1:
        raise ValueError(f"the final learning-rate factor is {final}, expected 0 to 1")
    starts = [share * total for share in _check_milestones(milestones)]
    if gamma is not None and not 0 < gamma <= 1:
        raise ValueError(f"gamma is {gamma}, expected more than 0, up to 1 (--optimizer.gamma)")
    at_each = (final, 1 / len(starts)) if gamma is None else (gamma, 1)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
        if name == "cosine":
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
        if name == "step":
            base, power = at_each
            return base ** (power * sum(step >= start for start in starts))
        return 1.0

    return factor


def _check_milestones(milestones: Sequence[float]) -> Sequence[float]:
    if not milestones or list(milestones) != sorted(set(milestones)) or not 0 < milestones[0] <= milestones[-1] < 1:
        raise ValueError(
            f"milestones are {tuple(milestones)}, expected shares of the run that rise between 0 and 1, such as 0.5 0.75 "
            "(--optimizer.milestones)"
        )
    return milestones


def ramp(step: int, total: int, fraction: float, peak: float) -> float:
    """Return a value that rises linearly from 0 at step 0 to `peak` after `fraction` of `total` steps, then stays.

    LARP's scheduled sampling uses fraction 0.3 and peak 0.5.
    """
    length = fraction * total
    return peak if step >= length else peak * step / length
