"""Measurements that fail or succeed one by one, with the record written after each, and the clocks of a GPU."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from larp.files import write_json

import torch


class Measurements:
    """Runs measurements one by one within a time limit.

    Args:
        out: JSON file, written again after each measurement.
        seconds: time limit of all measurements.
        record: what the file holds beside the measurements.
    """

    def __init__(self, out: Path, device: torch.device, seconds: float, record: dict[str, Any]):
        self.out, self.device = out, device
        self.ends = time.monotonic() + seconds
        self.figures: dict[str, dict[str, Any]] = {}
        self.record = record | {"measurements": self.figures}

    def take(self, name: str, work: Callable[[], dict[str, Any]], needs: float = 1.0) -> dict[str, Any]:
        """Record the figures of `work`, its error, or that it was skipped because less than `needs` seconds are left."""
        left, began = self.ends - time.monotonic(), time.monotonic()
        if left < needs:
            figures: dict[str, Any] = {"skipped": f"needs about {needs:.0f} s, {max(left, 0):.0f} s were left"}
        else:
            try:
                self._free_memory()
                figures = work()
                if self.device.type == "cuda":
                    figures["peak_memory"] = torch.cuda.max_memory_allocated(self.device)
            except Exception as error:
                # As text: a stored exception holds all tensors of its frames.
                figures = {"error": f"{type(error).__name__}: {str(error).strip()[:600]}"}
            figures["took"] = round(time.monotonic() - began, 2)
        self.figures[name] = figures
        # At once: if a kernel has broken the CUDA context, every later call that uses it fails.
        write_json(self.out, self.record)
        status = figures.get("error") or figures.get("skipped") or "done"
        print(f"{name}: {status.splitlines()[0][:160]} ({figures.get('took', 0)} s)", flush=True)
        return figures

    def _free_memory(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def mark(device: torch.device) -> Any:
    """Return a point in time of the device's work: a CUDA event on a GPU, else the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: Any, second: Any) -> float:
    """Return the seconds between two marks; on a GPU call `finish` first."""
    return second - first if isinstance(first, float) else first.elapsed_time(second) / 1000


def finish(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(
    work: Callable[[], Any], device: torch.device, budget: float, warm: int = 2, least: int = 3, most: int = 30
) -> float:
    """Return the median time of `work` in seconds, over `least` to `most` consecutive runs that take about `budget` seconds.

    `warm` runs and one more precede them.
    """
    for _ in range(warm):
        work()
    finish(device)
    began = time.monotonic()
    work()
    finish(device)
    alone = max(time.monotonic() - began, 1e-6)
    marks = [mark(device)]
    for _ in range(min(most, max(least, math.floor(budget / alone)))):
        work()
        marks.append(mark(device))
    finish(device)
    return median(between(a, b) for a, b in pairwise(marks))


def busiest(work: Callable[[], Any], device: torch.device, rows: int = 16) -> list[dict[str, Any]]:
    """Return the kernels (on a CPU the operators) of longest time in one run of `work`: name, calls, milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    with profile(activities=kinds) as seen:
        work()
        finish(device)
    spent = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    averages = sorted(seen.key_averages(), key=lambda one: -getattr(one, spent))[:rows]
    return [
        {"name": one.key[:90], "calls": one.count, "milliseconds": round(getattr(one, spent) / 1000, 3)}
        for one in averages
    ]


def copy_rate(size: int, budget: float, device: torch.device) -> dict[str, Any]:
    """Measure the bytes per second, read and written, of a copy of `size` bytes within the device's memory."""
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device, budget)
    return {"seconds": seconds, "bytes_a_second": 2 * size / seconds}


def matmul_rate(side: int, budget: float, device: torch.device) -> dict[str, Any]:
    """Measure the operations per second of a square matmul in bf16."""
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    seconds = seconds_of(lambda: a @ b, device, budget)
    return {"seconds": seconds, "operations_a_second": 2 * side**3 / seconds}
