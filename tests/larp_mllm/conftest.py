"""Tiny random models, shared by all tests of the plugin."""

from larp_mllm.pipeline import Mllm
from tests.larp_mllm.tiny import tiny_mllm

import pytest


@pytest.fixture(scope="session", params=["tiny-qwen2", "tiny-llama"])
def mllm(request) -> Mllm:
    """A model of each architecture: Qwen2 with a tied head, Llama with an untied one."""
    return tiny_mllm(request.param)


@pytest.fixture(scope="session")
def qwen() -> Mllm:
    """The Qwen2 model, where the architecture does not matter."""
    return tiny_mllm()
