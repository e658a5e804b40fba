"""Clocks for benchmarks: alternating laps of candidates, ratios of their times, the rate of matmuls, and memory in a process of its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from bench.flops import Matmul
from larp.kernels.matmul import linear

import torch
import torch.nn.functional as F

MIN_PAIRS = 3
"""Pairs of laps that a ratio rests on at least: the median of fewer is decided by a single lap that waited."""


class Lap(NamedTuple):
    """Wall time, and CPU time of this process on all cores (0 where a GPU does the work), in seconds."""

    seconds: float
    cpu_seconds: float

    @property
    def spent(self) -> float:
        """CPU time, which other work on the machine hardly changes; where a GPU works, wall time."""
        return self.cpu_seconds or self.seconds


def lap(work: Callable[[], Any], device: torch.device) -> Lap:
    """Time one run of `work`, to the end of what it started on a GPU."""
    _wait(device)
    began, used = time.perf_counter(), time.process_time()
    work()
    _wait(device)
    cpu = time.process_time() - used if device.type == "cpu" else 0.0
    return Lap(time.perf_counter() - began, cpu)


def alternate(works: Sequence[Callable[[], Any]], repeats: int, device: torch.device) -> list[list[Lap]]:
    """Time `repeats` laps of each candidate, alternating (ABAB...), so that other work on the machine slows all of them alike."""
    laps: list[list[Lap]] = [[] for _ in works]
    for _ in range(repeats):
        for own, work in zip(laps, works, strict=True):
            own.append(lap(work, device))
    return laps


def summary(laps: Sequence[Lap]) -> dict[str, Any]:
    """Return the median of the wall times and of the CPU times, and the times of each lap, in seconds."""
    figures: dict[str, Any] = {}
    for clock in _clocks(laps):
        times = [getattr(one, clock) for one in laps]
        figures |= {clock: median(times), f"all_{clock}": [round(one, 4) for one in times]}
    return figures


def ratios(ours: Sequence[Lap], theirs: Sequence[Lap]) -> dict[str, dict[str, float]]:
    """Return `time_ratio` and, on a CPU, `cpu_time_ratio`: time of ours over theirs, pair by pair as they were measured.

    Each holds median, lowest and highest of the pairs, and `fastest`, the ratio of the two fastest laps. Where a lap
    waited for the processor, wall times differ from CPU times, and the CPU times are to be trusted.
    Raises ValueError for fewer than `MIN_PAIRS` pairs.
    """
    if len(ours) < MIN_PAIRS:
        raise ValueError(f"a ratio of times needs at least {MIN_PAIRS} pairs of laps, got {len(ours)}")
    found = {}
    for clock, name in _clocks(ours).items():
        times = [(getattr(a, clock), getattr(b, clock)) for a, b in zip(ours, theirs, strict=True)]
        pairs, fastest = [a / b for a, b in times], [min(way) for way in zip(*times, strict=True)]
        found[name] = {
            "median": median(pairs),
            "lowest": min(pairs),
            "highest": max(pairs),
            "fastest": fastest[0] / fastest[1],
        }
    return found


def describe_ratios(case: dict[str, Any]) -> str:
    """Return the ratios of a record in words: medians, and the lowest and highest pair."""
    found = []
    for name, words in (("time_ratio", "wall time"), ("cpu_time_ratio", "CPU time")):
        if name in case:
            one = case[name]
            found.append(f"{words} {one['median']:.3f} ({one['lowest']:.3f} to {one['highest']:.3f})")
    return f"ratio of {', of '.join(found)}, {len(case['ours']['all_seconds'])} pairs"


def _clocks(laps: Sequence[Lap]) -> dict[str, str]:
    """The fields of a lap that were measured, and the name of their ratio."""
    return {"seconds": "time_ratio"} | ({"cpu_seconds": "cpu_time_ratio"} if laps[0].cpu_seconds else {})


def matmul_rates(
    matmuls: Iterable[Matmul], device: torch.device, dtype: torch.dtype, repeats: int = 3
) -> dict[str, float]:
    """Return the floating-point operations per second of a model's matmuls, each shape as often as the model runs it.

    The keys are "torch" (`torch.nn.functional.linear`) and "larp" (`larp.kernels.matmul`). The time is CPU time on a CPU,
    and the fastest of `repeats` for each shape.
    """
    ways = {"torch": F.linear, "larp": linear}
    flops, seconds = 0, dict.fromkeys(ways, 0.0)
    counts: dict[tuple[int, int, int], int] = {}
    for matmul in matmuls:
        shape = matmul[:3]
        counts[shape] = counts.get(shape, 0) + matmul.times
    for (rows, inner, columns), times in counts.items():
        x = torch.randn(rows, inner, device=device, dtype=dtype)
        weight = torch.randn(columns, inner, device=device, dtype=dtype)
        flops += 2 * rows * inner * columns * times
        with torch.inference_mode():
            for name, way in ways.items():
                # A small matmul runs several times: a single one is shorter than the clock's resolution.
                again = min(times, max(1, int(1e9 / (2 * rows * inner * columns))))
                work = _repeated(way, x, weight, again)
                work()
                best = min(lap(work, device).spent for _ in range(repeats))
                seconds[name] += best / again * times
    return {name: flops / spent for name, spent in seconds.items()}


def _repeated(way: Callable, x: torch.Tensor, weight: torch.Tensor, times: int) -> Callable[[], None]:
    def work() -> None:
        for _ in range(times):
            way(x, weight)

    return work


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process so far, in bytes: of tensors on a GPU, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage, whose maximum a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def in_fresh_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call `work` (importable by name) in a new process with as many threads as this one, and return what it returns."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_with_threads, torch.get_num_threads(), work, *arguments).result()
        except BrokenProcessPool as error:
            raise ValueError(
                "the process of a measurement was killed, perhaps because memory ran out: give a smaller --size or --batch-size"
            ) from error


def _with_threads(threads: int, work: Callable[..., Any], *arguments: Any) -> Any:
    torch.set_num_threads(threads)
    return work(*arguments)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
