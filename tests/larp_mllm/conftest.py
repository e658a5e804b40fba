"""Tiny random bases and tokenizers: every test of the plugin runs on these."""

from larp_mllm.pipeline import Mllm
from tests.larp_mllm.tiny import tiny_mllm

import pytest


@pytest.fixture(scope="session", params=["tiny-qwen2", "tiny-llama"])
def mllm(request) -> Mllm:
    """One of each architecture: Qwen2 with a tied head, Llama with its own."""
    return tiny_mllm(request.param)


@pytest.fixture(scope="session")
def qwen() -> Mllm:
    """The Qwen2 one alone, where the architecture does not matter."""
    return tiny_mllm()
