"""The number of threads of torch's CPU kernels."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import torch

_lock, _own = threading.Lock(), threading.local()
_users, _outside = 0, 1
"""Blocks of `threads` that are open in all Python threads, and torch's number of threads outside of them."""


def best_threads(run: Callable[[], object]) -> int:
    """Return torch's current number of threads if `run` is at least 10 % faster with it than with one thread, else 1.

    On a busy machine, threads that wait for each other take several times as long as one.
    """
    current = torch.get_num_threads()
    if current == 1:
        return 1

    one, many = [], []
    for _ in range(6):  # alternating, so that a busy moment affects both
        one.append(_seconds(run, 1))
        many.append(_seconds(run, current))
    # The first of each warms up.
    return current if median(many[1:]) * 1.1 < median(one[1:]) else 1


def _seconds(run: Callable[[], object], count: int) -> float:
    with threads(count):
        began = time.perf_counter()
        run()
        return time.perf_counter() - began


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set the number of threads of torch's CPU kernels inside the block; several Python threads may be in one at a time."""
    global _users, _outside
    with _lock:
        before = torch.get_num_threads()
        if _users == 0:
            _outside = before
        elif not getattr(_own, "inside", 0):
            # A thread that begins now inherits the number that another one has set for its block.
            before = _outside
        _users += 1
        _own.inside = getattr(_own, "inside", 0) + 1
        torch.set_num_threads(count)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            _own.inside -= 1
            torch.set_num_threads(before)


def cores() -> int:
    """Return the number of CPU cores that this process may use: those it may run on, or fewer by the quota of its container."""
    most = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(most, math.ceil(min(most, cpu_quota()))))


def limit_threads() -> None:
    """Let torch use as many threads as `cores`, where it would use one for each core of the machine in spite of a quota."""
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores():
        torch.set_num_threads(cores())


def cpu_quota(mounts: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Return the CPU seconds per second that the control groups (version 1 or 2) of this process allow, else infinity.

    mounts, own: where the groups lie, and the file that names those of this process.
    """
    quota = math.inf
    try:
        lines = own.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return quota
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            roots, read = (mounts, mounts / "unified"), _quota_of_version_2
        elif "cpu" in controllers.split(","):
            roots, read = (mounts / controllers, mounts / "cpu", mounts / "cpu,cpuacct"), _quota_of_version_1
        else:
            continue
        for root in roots:
            # A quota of a group holds for those in it. In a container the outer ones are not seen.
            path = root / group.lstrip("/")
            for folder in (path, *path.parents):
                if folder.is_relative_to(root):
                    with suppress(OSError, ValueError, ZeroDivisionError):
                        quota = min(quota, read(folder))
    return quota


def _quota_of_version_1(folder: Path) -> float:
    quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    return quota / period if quota > 0 else math.inf


def _quota_of_version_2(folder: Path) -> float:
    quota, period = (folder / "cpu.max").read_text().split()
    return math.inf if quota == "max" else int(quota) / int(period)
