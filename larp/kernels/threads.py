"""How many threads torch's CPU kernels run on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch


def best_threads(run: Callable[[], object]) -> int:
    """Return the present number of threads if it does `run` clearly faster than 1 at this moment, else 1.

    On a busy machine threads that wait for each other take several times as long as one.
    """
    most = torch.get_num_threads()
    if most == 1:
        return 1

    one, many = [], []
    for _ in range(6):  # in turn, so that a busy moment hits both
        one.append(_seconds(run, 1))
        many.append(_seconds(run, most))
    # The first of each warms up.
    return most if median(many[1:]) * 1.1 < median(one[1:]) else 1


def _seconds(run: Callable[[], object], count: int) -> float:
    with threads(count):
        began = time.perf_counter()
        run()
        return time.perf_counter() - began


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch's CPU kernels run on `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
