"""The clock of a run, by steps or by minutes, with a simulated time."""

from larp.engine import clock as clock_file
from larp.engine.clock import Clock

import pytest


@pytest.fixture
def time(monkeypatch):
    """A simulated time in seconds: `time.now += 1`."""

    class Time:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

    fake = Time()
    monkeypatch.setattr(clock_file, "time", fake)
    return fake


def test_a_clock_of_steps_is_the_count_of_steps(time):
    clock = Clock(steps=5)
    clock.start()
    seen = []
    while not clock.done:
        assert clock.position == clock.step
        time.now += 100
        clock.advance()
        seen.append((clock.step, clock.before, clock.due(2)))
    assert seen == [(1, 0, False), (2, 1, True), (3, 2, False), (4, 3, True), (5, 4, False)]
    assert clock.total == 5 and clock.metrics == {}


def test_minutes_are_a_share_of_the_schedule(time):
    clock = Clock(steps=600, minutes=10)
    clock.start()
    time.now += 77  # compiling
    clock.advance()
    assert (clock.step, clock.position, clock.elapsed) == (1, 0, 0), "the first step costs no time"
    time.now += 150
    clock.advance()
    assert (clock.step, clock.position, clock.before) == (2, 150, 0) and not clock.done
    assert clock.total is None and clock.metrics == {"place": 150, "minutes": 2.5}
    time.now += 1000
    clock.advance()
    assert clock.done and clock.position == 600, "never beyond the end"


def test_periodic_actions_do_not_depend_on_the_time_of_a_step(time):
    for seconds in (0.25, 1.0, 7.0):
        clock, due = Clock(steps=300, minutes=1), []
        clock.start()
        while not clock.done:
            time.now += seconds
            clock.advance()
            due += [clock.position] if clock.due(100) else []
        assert len(due) == 3
        assert all(0 <= place - 100 * number <= 5 * seconds for number, place in enumerate(due, 1))


def test_schedules_are_evaluated_at_the_position(time):
    steps, minutes = Clock(steps=100), Clock(steps=100, minutes=1)
    assert steps.on_schedule(lambda place: place)(7) == 7
    whole, stage = minutes.on_schedule(lambda place: place), minutes.on_schedule(lambda place: place, first=40)
    minutes.start()
    minutes.advance()
    assert (whole(7), stage(7)) == (0, 0)
    time.now += 30
    minutes.advance()
    assert (whole(7), stage(7)) == (50, 10)


def test_a_resumed_clock_continues_from_its_seconds(time):
    clock = Clock(steps=100, minutes=1)
    clock.start(step=40, elapsed=30)
    assert (clock.step, clock.position) == (40, 50) and not clock.done
    time.now += 5
    clock.advance()
    assert clock.elapsed == 30, "the first step of a process compiles again"
    time.now += 15
    clock.advance()
    assert (clock.step, clock.position) == (42, 75)
    clock.start(step=42, elapsed=60)
    assert clock.done


@pytest.mark.parametrize("minutes", [0, -1.0, float("nan"), float("inf")])
def test_invalid_minutes_are_refused(minutes):
    with pytest.raises(ValueError, match="minutes"):
        Clock(10, minutes)
