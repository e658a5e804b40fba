"""A token cache, a base and a text for tiny runs of training/train_mllm.py."""

from pathlib import Path

from tests.larp_mllm.engine.runs import SMALL
from tests.larp_mllm.tiny import tiny_cache
from training import train_mllm

import pytest


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tiny_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def base(qwen, tmp_path_factory) -> Path:
    """The folder of a tiny base, which training takes for a pretrained one."""
    folder = tmp_path_factory.mktemp("base")
    qwen.model.base.save_pretrained(folder)
    qwen.processor.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prose(tmp_path_factory) -> str:
    """A short held-out text, which is scored faster than that of the package."""
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text("The kettle was on the stove, and the rain kept falling.")
    return f"txt:{path}"


@pytest.fixture
def train(cache, prose):
    def run(out: Path, *options: str, tokens: Path | None = cache) -> dict:
        data = [] if tokens is None else ["--tokens", str(tokens)]
        return train_mllm.main([*data, "--out", str(out), "--eval-text", prose, *SMALL, *options])

    return run
