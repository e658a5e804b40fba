"""The position of a run on its schedules: by steps, or by the share of its minutes that has passed.

    clock = Clock(steps=3600, minutes=10)
    while not clock.done:
        ...                       # a step at clock.position: learning rate, temperature, which losses take part
        clock.advance()           # after each step
        if clock.due(1200):       # after every 1200 steps of the schedule: here every 200 seconds
            ...

A recipe is written in steps. With `minutes` it keeps its shape: what it does at step 900 of 3600 is done after a quarter of the time,
however many steps the machine has done by then.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from larp.engine import distributed as ranks


class Clock:
    """The length of a run and the position that it has reached, the same on all ranks.

    Args:
        steps: length of the schedules; without minutes, of the run itself.
        minutes: length of the run in time, including validation and saving between steps; None counts steps.

    step: steps done. position: on the schedule, in steps of the schedule; without minutes it is `step`. before: the position before
    the last step.
    Raises ValueError for minutes that are not positive and finite.
    """

    def __init__(self, steps: int, minutes: float | None = None):
        check_minutes(minutes)
        self.steps, self.minutes = steps, minutes
        self.step, self._elapsed = 0, 0.0
        self.position: float = 0
        self.before: float = -1
        self._since, self._first = time.monotonic(), True

    def start(self, step: int = 0, elapsed: float = 0.0) -> None:
        """Begin to count, or go on after so many steps and seconds.

        The time before this call is not counted, and neither is the first step, in which models are compiled.
        """
        self.step, self._elapsed, self._since, self._first = step, elapsed, time.monotonic(), True
        self.position = self._place()
        self.before = self.position - 1

    @property
    def elapsed(self) -> float:
        """Seconds since the start, including those before the run was resumed."""
        return self._elapsed + time.monotonic() - self._since

    @property
    def total(self) -> int | None:
        """Steps of the run; None if its length is in minutes."""
        return self.steps if self.minutes is None else None

    @property
    def metrics(self) -> dict[str, float]:
        """For the log of a run in minutes: the position on the schedule ("place"), and the minutes so far; else empty."""
        return {} if self.minutes is None else {"place": self.position, "minutes": self.elapsed / 60}

    @property
    def done(self) -> bool:
        """Whether the end of the run is reached."""
        return self.position >= self.steps

    def advance(self) -> None:
        """Count a step. Collective if the run has minutes: the time of the first rank counts."""
        self.step += 1
        if self._first:
            self._since, self._first = time.monotonic(), False
        self.before, self.position = self.position, self._place()

    def due(self, every: int) -> bool:
        """Whether the last step passed a multiple of `every` on the schedule."""
        return self.position // every > self.before // every

    def on_schedule(self, factor: Callable[[float], float], first: int = 0) -> Callable[[int], float]:
        """Return `factor`, such as a learning-rate factor, as a function of the step that is evaluated at the position of the clock.

        first: position at which the stage of the factor begins.
        """
        return factor if self.minutes is None else lambda _: factor(max(0.0, self.position - first))

    def _place(self) -> float:
        if self.minutes is None:
            return self.step
        return min(1.0, ranks.broadcast_object(self.elapsed) / (60 * self.minutes)) * self.steps


def check_minutes(minutes: float | None) -> None:
    """Raise ValueError unless the minutes of a run are positive and finite, or None."""
    if minutes is not None and not 0 < minutes < math.inf:
        raise ValueError(f"minutes = {minutes} must be positive and finite")
