"""The GPU tests on a CPU, all of them, so that they are whole when a GPU is at hand."""

import os
import subprocess
import sys

from tests.conftest import ROOT

import pytest

# What a CPU has not, or the reference's values where they are absent.
ALLOWED = ("needs golden data", "a CPU has nothing to wait for", "the kernels are for a GPU")


@pytest.mark.slow
@pytest.mark.long
def test_the_gpu_tests_pass_on_a_cpu():
    environment = os.environ | {"LARP_GPU_TESTS_ON": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-q", "-rs", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:]
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert not [line for line in skipped if not any(words in line for words in ALLOWED)], skipped
