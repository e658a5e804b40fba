"""Tiny random models, shared by all tests of the plugin."""

from larp_mllm.pipeline import Mllm
from tests.larp_mllm.tiny import tiny_mllm

import pytest

# Of the common tests of transformers, see model/test_common.py.
_THEIR_MARKS = (
    "generate",
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_2_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "torch_compile_test",
    "torch_export_test",
    "onnx_export_test",
    "executorch_export_test",
)


def pytest_configure(config):
    """Make their marks known to --strict-markers."""
    for mark in _THEIR_MARKS:
        config.addinivalue_line("markers", f"{mark}: of transformers' common tests")


@pytest.fixture(scope="session", params=["tiny-qwen2", "tiny-llama"])
def mllm(request) -> Mllm:
    """A model of each architecture: Qwen2 with a tied head, Llama with an untied one."""
    return tiny_mllm(request.param)


@pytest.fixture(scope="session")
def qwen() -> Mllm:
    """The Qwen2 model, where the architecture does not matter."""
    return tiny_mllm()
