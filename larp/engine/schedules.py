"""Learning-rate factors and ramps: pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

SCHEDULES = ("cosine", "constant", "step")


def lr_factor(name: str, total: int, warmup: int, final: float) -> Callable[[int], float]:
    """The factor in (0, 1] on the learning rate of step 0, 1, ... total - 1: linear warm-up over `warmup` steps, then
    `name`.

    "cosine" falls along half a cosine to `final` at the last step; "step" drops to sqrt(final) at half of the run and
    to `final` at three quarters; "constant" stays at 1. Steps beyond the end keep the last factor. Raises ValueError
    for an unknown name, a warm-up that is not shorter than the run, or a `final` outside [0, 1].
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule '{name}', expected one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup < max(total, 1):
        raise ValueError(
            f"warmup is {warmup} steps of a run of {total}: it must be 0 or more and shorter than the run; lower it "
            "(--optimizer.warmup; for train_mllm.py --warmup), or train longer"
        )
    if not 0 <= final <= 1:
        raise ValueError(f"the final learning-rate factor is {final}, expected 0 to 1")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
        if name == "cosine":
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
        if name == "step":
            return 1.0 if step < total * 0.5 else math.sqrt(final) if step < total * 0.75 else final
        return 1.0

    return factor


def ramp(step: int, total: int, fraction: float, peak: float) -> float:
    """Rise linearly from 0 at step 0 to `peak` after `fraction` of `total` steps, then stay (LARP's scheduled
    sampling: 0.3, 0.5).
    """
    length = fraction * total
    return peak if step >= length else peak * step / length
