"""Trainings, token extraction and fetch, killed with SIGKILL at random moments; see killed.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.faults.jobs import difference

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("LARP_KILLS", "20"))


@pytest.mark.slow
@pytest.mark.parametrize("job", ["tokenizer", "generator", "language-model", "extraction", "fetch"])
def test_a_killed_program_ends_as_an_undisturbed_one(job, tmp_path):
    names = [job, *([f"{job}-2-ranks"] if job not in ("extraction", "fetch") else [])]
    command = [
        sys.executable,
        "-m",
        "tests.faults.killed",
        "--kills",
        str(KILLS),
        "--out",
        str(tmp_path / "counts.json"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run([*command, "--jobs", *names], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads((tmp_path / "counts.json").read_text())["jobs"]
    assert sum(counts[name]["kills"] for name in names) == KILLS // len(names) * len(names)
    assert all(counts[name]["equal"] == counts[name]["runs"] > 0 for name in names)


def test_runs_that_differ_in_one_bit_are_told_apart():
    one = {"a.pt": {"module": {"w": torch.tensor([0.0, 1.0])}}, "metrics.jsonl": [{"loss": 1.0, "time": 1}]}
    same = {"a.pt": {"module": {"w": torch.tensor([0.0, 1.0])}}, "metrics.jsonl": [{"loss": 1.0, "time": 2}]}
    assert difference(one, same) is None
    minus = {**same, "a.pt": {"module": {"w": torch.tensor([-0.0, 1.0])}}}
    assert difference(one, minus) == "/a.pt/module/w"
    assert difference(one, {**same, "metrics.jsonl": [{"loss": 1.5, "time": 1}]}).startswith("/metrics.jsonl[0]/loss")
    assert "b.pt" in difference(one, same | {"b.pt": {}})
