"""The device that all GPU tests take, and the trainings that run beside them: a process each, as many at a time as fit.

`python -m pytest -m gpu tests/gpu` on a machine with a GPU; LARP_GPU_TESTS_ON=cpu rehearses all of it without one.
"""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from larp.kernels.threads import cores
from tests.conftest import ROOT, beside

import pytest
import torch

# A process takes seconds to import DeepSpeed, so all of them begin before the first test, and the tests collect what they say.
TRAININGS = {
    "whole": ["resume"],
    "cut": ["resume", "--kill-at", "4"],
    "zero0": ["steps", "0"],
    "zero2": ["steps", "2"],
    "zero3": ["steps", "3"],
    "compile": ["compile"],
}
PATIENCE = 120


def _on_cpu() -> bool:
    return os.environ.get("LARP_GPU_TESTS_ON") == "cpu"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests run; they are skipped where there is no CUDA device."""
    if _on_cpu():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device (LARP_GPU_TESTS_ON=cpu rehearses these tests without one)")
    return torch.device("cuda", 0)


@pytest.fixture
def exact(device):
    """Float32 as it is written: no TF32 in products, which keeps 10 bits of 23."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def golden(name: str) -> Path:
    """A folder of the reference's values; skipped where it, or one of its files, is absent."""
    folder = beside("golden") / name
    for file in ("config.json", "model.safetensors", "expected.safetensors"):
        if not (folder / file).is_file():
            pytest.skip(f"needs the golden values {name}/{file} beside the checkout")
    return folder


class Trainings:
    """The processes of `TRAININGS`, started by `start`."""

    def __init__(self, folder: Path, on_cpu: bool):
        self.folder, self.on_cpu = folder, on_cpu
        # On a small machine they take turns: each of them computes all the time.
        self.pool = ThreadPoolExecutor(max_workers=max(1, cores() - 1))
        self.running: dict[str, Future[dict]] = {}
        self.open: set[subprocess.Popen] = set()

    def start(self) -> "Trainings":
        """Begin them all."""
        self.running = {name: self.pool.submit(self._run, name, work) for name, work in TRAININGS.items()}
        return self

    def result(self, name: str) -> dict:
        """Wait for one, and return what it found; AssertionError with its last lines if it failed."""
        return self.running[name].result()

    def _run(self, name: str, work: list[str]) -> dict:
        done = self._process(name, work)
        if "--kill-at" in work:
            assert done.returncode == -signal.SIGKILL, done.stdout[-3000:]
            done = self._process(name, [*work[:1], "--resume"])
        assert done.returncode == 0, f"{name}: {done.stdout[-3000:]}"
        return json.loads(next(line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")))

    def _process(self, name: str, work: list[str]) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "tests.gpu.worker", *work, "--out", str(self.folder / name)]
        # What DeepSpeed would build lies in the folder of extensions, and is a failure.
        own = {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
            "OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "TORCH_EXTENSIONS_DIR": str(self.folder / "extensions"),
            # The same for all, whenever they start: weights of metrics that one finds and another does not sample random numbers.
            "LARP_DATA": str(self.folder / "data"), "LARP_CACHE": str(self.folder / "cache"),
        }  # fmt: skip
        if self.on_cpu:
            own |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} | own
        patience = PATIENCE * (6 if self.on_cpu else 1)
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            self.open.add(process)
            try:
                output, _ = process.communicate(timeout=patience)
            except subprocess.TimeoutExpired:
                process.kill()
                output = f"{process.communicate()[0]}\n(no answer in {patience} s)"
            self.open.discard(process)
        return subprocess.CompletedProcess(command, process.returncode, output)

    def stop(self) -> None:
        """End what still runs."""
        for future in self.running.values():
            future.cancel()
        for process in list(self.open):
            process.kill()
        self.pool.shutdown()


@pytest.fixture(scope="session", autouse=True)
def trainings(request, tmp_path_factory):
    """All trainings, begun before the first test; none where no test asks for them, or there is no device."""
    wanted = any(
        "trainings" in getattr(item, "fixturenames", ()) and "test_training" in item.nodeid
        for item in request.session.items
    )
    if not wanted or not (_on_cpu() or torch.cuda.is_available()):
        yield None
        return
    begun = Trainings(tmp_path_factory.mktemp("trainings"), _on_cpu()).start()
    yield begun
    begun.stop()
