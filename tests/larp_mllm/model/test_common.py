"""The common tests of transformers, where they lie beside the checkout: what every model of theirs must pass, with two bases."""

import copy
import sys
import unittest
from pathlib import Path

from larp_mllm.model.configuration import LarpMllmConfig
from larp_mllm.model.modeling import LarpMllmForCausalLM
from tests.larp_mllm.families import FAMILIES

import pytest
import torch

pytestmark = pytest.mark.slow
COMMON = Path(__file__).resolve().parents[4] / "shared" / "conformance"
if not COMMON.is_dir():
    pytest.skip("needs conformance data beside the checkout", allow_module_level=True)
pytest.importorskip("parameterized")
sys.path.insert(0, str(COMMON))
from transformers_common.generation.test_utils import GenerationTesterMixin  # noqa: E402
from transformers_common.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask  # noqa: E402

RESIZE = "video ids follow those of text, so that the number of rows is fixed; larp-mllm export gives a checkpoint that can be resized"
REFUSED = {
    "test_resize_tokens_embeddings": RESIZE,
    "test_resize_embeddings_untied": RESIZE,
    "test_model_get_set_embeddings": "the embedding of all ids is computed of the base and the adapter: it is no nn.Embedding",
    "test_correct_missing_keys": "base_model is the decoder of all ids, which has no weights of its own to save",
    "test_internal_model_config_and_subconfig_are_same": "the base keeps its own config, with its own number of rows",
}


class _ModelTester:
    is_training = True
    base_model_class = None
    batch_size, seq_length = 3, 7
    encoder_seq_length = key_length = seq_length
    num_hidden_layers, hidden_size, num_attention_heads, vocab_size = 2, 32, 4, 117

    def __init__(self, family: str):
        self.family = family

    def get_config(self) -> LarpMllmConfig:
        text = FAMILIES[self.family]()
        text.pad_token_id = 0
        return LarpMllmConfig(text_config=text, text_size=99, codebook_size=16, code_dim=4, tokens_per_video=4)

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": random_attention_mask(ids.shape)}


class _Common(ModelTesterMixin, GenerationTesterMixin):
    all_model_classes = all_generative_model_classes = (LarpMllmForCausalLM,)
    has_attentions = True
    family = ""

    def setUp(self):
        if (reason := REFUSED.get(self._testMethodName)) is not None:
            self.skipTest(reason)
        self.model_tester = _ModelTester(self.family)

    def _prepare_for_class(self, inputs, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs)
        if return_labels:
            inputs["labels"] = torch.zeros(inputs["input_ids"].shape, dtype=torch.int64)
        return inputs


class Qwen2Test(_Common, unittest.TestCase):
    family = "qwen2-tied"


class LlamaTest(_Common, unittest.TestCase):
    family = "llama2"


def test_what_is_refused_is_named():
    assert len(REFUSED) <= 5 and all(hasattr(_Common, name) for name in REFUSED)
