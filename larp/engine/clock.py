"""The position of a run on its schedules, by steps or by time.

    clock = Clock(steps=3600, minutes=10)
    while not clock.done:
        ...                       # a step at clock.position: learning rate, temperature, active losses
        clock.advance()           # after each step
        if clock.due(1200):       # every 1200 steps of the schedule: here every 200 seconds
            ...

Recipes are written in steps. With `minutes` their schedules are stretched over that time: what belongs to step 900 of
3600 happens after a quarter of the time, whatever the number of steps so far.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from larp.engine import distributed as ranks


class Clock:
    """The length of a run and its position, the same on all ranks.

    Args:
        steps: length of the schedules; without minutes, also of the run.
        minutes: length of the run in time, including validation and saving; None counts steps.

    Attributes:
        step: number of steps done.
        position: position on the schedules in steps; equal to `step` without minutes.
        before: position before the last step.

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
        """Start at a number of steps and elapsed seconds, which are 0 unless the run is resumed.

        Time before this call and during the first step, in which models are compiled, does not count.
        """
        self.step, self._elapsed, self._since, self._first = step, elapsed, time.monotonic(), True
        self.position = self._position()
        self.before = self.position - 1

    @property
    def elapsed(self) -> float:
        """Seconds since the start, including those before a resumption."""
        return self._elapsed + time.monotonic() - self._since

    @property
    def total(self) -> int | None:
        """Number of steps of the run; None if its length is in minutes."""
        return self.steps if self.minutes is None else None

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics for the log of a run in minutes: `place`, the position on the schedule, and elapsed `minutes`."""
        return {} if self.minutes is None else {"place": self.position, "minutes": self.elapsed / 60}

    @property
    def done(self) -> bool:
        """Whether the end of the run is reached."""
        return self.position >= self.steps

    def advance(self) -> None:
        """Count a step. Collective for a run in minutes, which uses the time of rank 0."""
        self.step += 1
        if self._first:
            self._since, self._first = time.monotonic(), False
        self.before, self.position = self.position, self._position()

    def due(self, every: int) -> bool:
        """Whether the last step passed a multiple of `every` on the schedule."""
        return self.position // every > self.before // every

    def on_schedule(self, factor: Callable[[float], float], first: int = 0) -> Callable[[int], float]:
        """Return `factor`, a function of the step such as a learning-rate factor, evaluated at the current position.

        first: position that `factor` counts from, for a later stage of a run.
        """
        return factor if self.minutes is None else lambda _: factor(max(0.0, self.position - first))

    def _position(self) -> float:
        if self.minutes is None:
            return self.step
        return min(1.0, ranks.broadcast_object(self.elapsed) / (60 * self.minutes)) * self.steps


def check_minutes(minutes: float | None) -> None:
    """Raise ValueError unless the minutes of a run are positive and finite, or None."""
    if minutes is not None and not 0 < minutes < math.inf:
        raise ValueError(f"minutes = {minutes} must be positive and finite")
