"""eval/bench/timing.py: ratios rest on three pairs, in wall time and CPU time, and a fresh process has memory of its own."""

from bench import timing
from bench.timing import Lap, describe_ratios, ratios, summary

import pytest
import torch


def test_a_lap_that_waited_shows_in_wall_time_alone():
    ours, theirs = [Lap(2.0, 2.0), Lap(2.0, 2.0), Lap(2.2, 2.0)], [Lap(4.0, 4.0), Lap(9.0, 4.0), Lap(4.0, 4.0)]
    found = ratios(ours, theirs)
    assert found["cpu_time_ratio"] == dict.fromkeys(("median", "lowest", "highest", "fastest"), 0.5)
    expected = {"median": 0.5, "lowest": 2 / 9, "highest": 0.55, "fastest": 0.5}
    assert found["time_ratio"] == pytest.approx(expected)
    case = {"ours": summary(ours), "reference": summary(theirs), **found}
    assert case["reference"]["all_seconds"] == [4, 9, 4] and case["reference"]["all_cpu_seconds"] == [4, 4, 4]
    assert describe_ratios(case).startswith(
        "ratio of wall time 0.500 (0.222 to 0.550), of CPU time 0.500 (0.500 to 0.500), 3"
    )


def test_a_ratio_needs_three_pairs():
    with pytest.raises(ValueError, match="at least 3 pairs of laps, got 2"):
        ratios([Lap(1.0, 1.0)] * 2, [Lap(1.0, 1.0)] * 2)


def test_a_gpu_has_wall_time_alone():
    laps = [Lap(1.0, 0.0)] * 3
    assert set(ratios(laps, laps)) == {"time_ratio"} and set(summary(laps)) == {"seconds", "all_seconds"}
    assert Lap(2.0, 0.0).spent == 2 and Lap(2.0, 1.5).spent == 1.5


def test_candidates_alternate():
    calls = []
    laps = timing.alternate([lambda: calls.append("a"), lambda: calls.append("b")], 3, torch.device("cpu"))
    assert "".join(calls) == "ababab" and [len(own) for own in laps] == [3, 3]


def peaks_around_ballast() -> tuple[int, int]:
    """The peak of memory before and after 512 MB are filled."""
    before = timing.peak_memory(torch.device("cpu"))
    torch.ones(2**29, dtype=torch.uint8)
    return before, timing.peak_memory(torch.device("cpu"))


@pytest.mark.slow
def test_fresh_processes_have_memory_and_threads_of_their_own():
    ballast = torch.ones(2**29, dtype=torch.uint8)
    # In a process of its own: in this one, an earlier test may have had more.
    before, after = timing.in_fresh_process(peaks_around_ballast)
    assert after >= before + 2**29 - 2**28
    assert timing.in_fresh_process(timing.peak_memory, torch.device("cpu")) < len(ballast)
    assert timing.in_fresh_process(torch.get_num_threads) == torch.get_num_threads()
