"""Clocks for benchmarks: candidates timed in turn, the machine's rate of multiplication, and memory in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from bench.flops import Product
from larp.kernels.matmul import linear

import torch
import torch.nn.functional as F


class Lap(NamedTuple):
    """Seconds on the clock, and of this process on all cores (0 where a GPU does the work)."""

    seconds: float
    cpu_seconds: float


def lap(work: Callable[[], Any], device: torch.device) -> Lap:
    """Time one run of `work`, to the end of what it started on a GPU."""
    _wait(device)
    began, used = time.perf_counter(), time.process_time()
    work()
    _wait(device)
    cpu = time.process_time() - used if device.type == "cpu" else 0.0
    return Lap(time.perf_counter() - began, cpu)


def in_turn(works: Sequence[Callable[[], Any]], repeats: int, device: torch.device) -> list[list[Lap]]:
    """Time candidates in turn (ABAB...), so that what else the machine does meets all of them: `repeats` laps for each."""
    laps: list[list[Lap]] = [[] for _ in works]
    for _ in range(repeats):
        for own, work in zip(laps, works, strict=True):
            own.append(lap(work, device))
    return laps


def summary(laps: Sequence[Lap]) -> dict[str, Any]:
    """Medians of laps, and all of them."""
    figures = {"seconds": median(one.seconds for one in laps), "all_seconds": [round(one.seconds, 4) for one in laps]}
    cpu = median(one.cpu_seconds for one in laps)
    return figures | ({"cpu_seconds": cpu} if cpu else {})


def ratio(ours: Sequence[Lap], theirs: Sequence[Lap]) -> dict[str, float]:
    """Time of ours over theirs, pair by pair as they were measured: median, lowest and highest."""
    pairs = [a.seconds / b.seconds for a, b in zip(ours, theirs, strict=True)]
    figures = {"median": median(pairs), "lowest": min(pairs), "highest": max(pairs)}
    if ours[0].cpu_seconds:
        figures["cpu_median"] = median(a.cpu_seconds / b.cpu_seconds for a, b in zip(ours, theirs, strict=True))
    return figures


def multiply_rates(
    products: Iterable[Product], device: torch.device, dtype: torch.dtype, repeats: int = 3
) -> dict[str, float]:
    """Floating-point operations a second of the products of a model, each of its shapes multiplied as often as the model does.

    Returns {"torch": ..., "larp": ...}: torch's own way, and that of `larp.kernels.matmul`. Best of `repeats` for each shape.
    """
    ways = {"torch": F.linear, "larp": linear}
    flops, seconds = 0, dict.fromkeys(ways, 0.0)
    counts: dict[tuple[int, int, int], int] = {}
    for product in products:
        shape = product[:3]
        counts[shape] = counts.get(shape, 0) + product.times
    for (rows, inner, columns), times in counts.items():
        x = torch.randn(rows, inner, device=device, dtype=dtype)
        weight = torch.randn(columns, inner, device=device, dtype=dtype)
        flops += 2 * rows * inner * columns * times
        with torch.inference_mode():
            for name, way in ways.items():
                # Small products are run a few times over: a single one is over before a clock can tell.
                again = min(times, max(1, int(1e9 / (2 * rows * inner * columns))))
                work = _repeated(way, x, weight, again)
                work()
                best = min(lap(work, device).seconds for _ in range(repeats))
                seconds[name] += best / again * times
    return {name: flops / spent for name, spent in seconds.items()}


def _repeated(way: Callable, x: torch.Tensor, weight: torch.Tensor, times: int) -> Callable[[], None]:
    def work() -> None:
        for _ in range(times):
            way(x, weight)

    return work


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: of a GPU's memory in tensors, else of resident memory."""
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
                "the process of a measurement was killed, for want of memory perhaps: take a smaller --size or --batch-size"
            ) from error


def _with_threads(threads: int, work: Callable[..., Any], *arguments: Any) -> Any:
    torch.set_num_threads(threads)
    return work(*arguments)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on: processor, threads, torch, and what else loads the machine (its load average)."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else (names or ["unknown"])[0],
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
