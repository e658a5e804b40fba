"""The number of cores: affinity and the quotas of control groups."""

import math

from larp.kernels import threads
from larp.kernels.threads import cores, cpu_quota

import pytest


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/a/b\n", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
        ("0::/gone\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/\n", {}, math.inf),
        (
            "3:cpu,cpuacct:/a\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "50000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("1:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ("4:cpuset:/a\n", {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"}, math.inf),
    ],
)
def test_the_smallest_quota_of_a_group_counts(tmp_path, own, files, quota):
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        path = tmp_path / "mounts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert cpu_quota(tmp_path / "mounts", tmp_path / "own") == quota


@pytest.mark.parametrize(("quota", "count"), [(0.5, 1), (1.5, 2), (3, 3), (math.inf, 8)])
def test_a_quota_counts_as_the_number_of_cores(monkeypatch, quota, count):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    assert cores() == count
