"""Measurements that stand alone: each in its own try block with its own time, and the record on disk after each one."""

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
    """Runs measurements one by one, until the time is over.

    Args:
        out: the JSON file, written anew after each measurement.
        seconds: all that there is.
        record: what the file holds beside the measurements.
    """

    def __init__(self, out: Path, device: torch.device, seconds: float, record: dict[str, Any]):
        self.out, self.device = out, device
        self.ends = time.monotonic() + seconds
        self.figures: dict[str, dict[str, Any]] = {}
        self.record = record | {"measurements": self.figures}

    def take(self, name: str, work: Callable[[], dict[str, Any]], needs: float = 1.0) -> dict[str, Any]:
        """Note the figures of `work`, or its error; or, where less than `needs` seconds are left, that it was skipped."""
        left, began = self.ends - time.monotonic(), time.monotonic()
        if left < needs:
            figures: dict[str, Any] = {"skipped": f"needs about {needs:.0f} s, {max(left, 0):.0f} s were left"}
        else:
            try:
                self._forget()
                figures = work()
                if self.device.type == "cuda":
                    figures["peak_memory"] = torch.cuda.max_memory_allocated(self.device)
            except Exception as error:
                # As text: an exception that is kept keeps all tensors of its frames.
                figures = {"error": f"{type(error).__name__}: {str(error).strip()[:600]}"}
            figures["took"] = round(time.monotonic() - began, 2)
        self.figures[name] = figures
        # At once: where a kernel has broken the GPU's context, nothing that asks it comes back.
        write_json(self.out, self.record)
        said = figures.get("error") or figures.get("skipped") or "done"
        print(f"{name}: {said.splitlines()[0][:160]} ({figures.get('took', 0)} s)", flush=True)
        return figures

    def _forget(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def mark(device: torch.device) -> Any:
    """A point in time of the device's own work: an event on a GPU, else the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: Any, second: Any) -> float:
    """Seconds between two marks; on a GPU after a synchronisation."""
    return second - first if isinstance(first, float) else first.elapsed_time(second) / 1000


def finish(device: torch.device) -> None:
    """Wait for all that was started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(
    work: Callable[[], Any], device: torch.device, budget: float, warm: int = 2, least: int = 3, most: int = 30
) -> float:
    """The median time of `work` over `least` to `most` runs one right after the other, about `budget` seconds of them.

    `warm` runs and one more go before.
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
    """The kernels (on a CPU the operators) that one run of `work` spends its time in: name, calls, milliseconds."""
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
    """Bytes a second, read and written, of a copy of so many bytes within the device's memory."""
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device, budget)
    return {"seconds": seconds, "bytes_a_second": 2 * size / seconds}


def matmul_rate(side: int, budget: float, device: torch.device) -> dict[str, Any]:
    """Operations a second of a square product in bf16."""
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    seconds = seconds_of(lambda: a @ b, device, budget)
    return {"seconds": seconds, "operations_a_second": 2 * side**3 / seconds}
