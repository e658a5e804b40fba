"""Fixtures for all tests: where real data lie, and a home of their own for caches."""

import itertools
import os
import resource
from contextlib import contextmanager
from pathlib import Path

# Models of a few thousand weights gain nothing from threads, and lose a third of the time where cores are few or busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import larp  # noqa: F401  (before torch: it sets how torch's threads wait)
from larp.metrics.weights import SOURCES

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
_homes = itertools.count()
USERS_CACHE = os.environ.get("LARP_CACHE")


def beside(name: str) -> Path:
    """Return a folder that may lie beside the checkout; the test is skipped, never passed, where it is absent."""
    folder = ROOT.parent / "shared" / name
    if not folder.is_dir():
        pytest.skip(f"needs {name} data beside the checkout")
    return folder


@pytest.fixture(scope="session")
def golden_root() -> Path:
    """Weights and outputs of the reference implementation."""
    return beside("golden")


@pytest.fixture(scope="session")
def clips_root() -> Path:
    """Real video clips."""
    return beside("clips")


@pytest.fixture(autouse=True)
def seeded():
    """Let a test sample the same numbers whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def full_disk():
    """`with full_disk():` no file grows beyond 4 kB, as if the disk were full; the system says "File too large"."""

    # Not for the whole test: pytest's own output, which may go to a file, would find the disk full as well.
    @contextmanager
    def limited():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(autouse=True, scope="session")
def session_home(tmp_path_factory):
    """The same for fixtures of modules, which run before those of a test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LARP_DATA", "LARP_MLLM_HOME"):
            patch.setenv(name, str(tmp_path_factory.getbasetemp() / "home" / "modules" / name))
        yield


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory):
    """Keep rendered videos out of the user's home, and the pointer to the newest model out of that and other tests'."""
    home = tmp_path_factory.getbasetemp() / "home"
    # Of its own: a test may undo the changes of the fixture monkeypatch.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LARP_DATA", str(home / "data"))
        patch.setenv("LARP_MLLM_HOME", str(home / f"mllm-{next(_homes)}"))
        patch.setenv("LARP_CACHE", str(home / "no-weights"))
        for name in ("LARP_MLLM_MODEL", "LARP_UCF101"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture
def fetched(own_home, monkeypatch):
    """`fetched("lpips")`: the published weights of that name in the user's cache; the test is skipped where they are absent."""
    if USERS_CACHE is None:
        monkeypatch.delenv("LARP_CACHE")
    else:
        monkeypatch.setenv("LARP_CACHE", USERS_CACHE)

    def need(name: str) -> Path:
        path = SOURCES[name].converted
        if not path.is_file():
            pytest.skip(f"needs published weights: larp-mllm fetch {name}")
        return path

    return need
