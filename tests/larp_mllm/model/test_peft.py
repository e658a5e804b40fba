"""Updates of peft to a model with video ids: what is trained gives the same logits after saving, loading and merging."""

import copy

from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.model.parts import EXCLUDED
from tests.larp_mllm.families import FAMILIES

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module", params=["qwen2-tied", "llama2"])
def model(request):
    """Ids 0 to 98 are text, 99 and 100 controls, 101 to 116 codes."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(FAMILIES[request.param]())
    return LarpMllmForCausalLM.from_base(base, 0, torch.randn(16, 4), 4).eval()


@pytest.fixture
def ids(model):
    """A row of text and a video."""
    return torch.tensor([[5, 6, 7, *model.vocabulary.span([1, 2, 3, 0]), 8, 9]])


def trained(model: LarpMllmForCausalLM, ids: torch.Tensor, **settings) -> PeftModel:
    updated = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, task_type="CAUSAL_LM", **settings)).train()
    optimizer = torch.optim.SGD([p for p in updated.parameters() if p.requires_grad], 0.5)
    for _ in range(2):
        updated(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return updated.eval()


def is_tied(model: LarpMllmForCausalLM) -> bool:
    return model.base.config.tie_word_embeddings


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["adapter"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 8]}},
    ],
    ids=str,
)
def test_what_is_trained_is_saved_loaded_and_merged_or_refused(model, ids, settings, tmp_path):
    of_one_layer = {"embed_tokens", "lm_head"} & {
        *settings["target_modules"],
        *settings.get("trainable_token_indices", []),
    }
    if is_tied(model) and of_one_layer:
        with pytest.raises(
            ValueError, match=r'cannot be merged into this base.*leave them out, or .*\["embed_tokens"\]'
        ):
            trained(model, ids, **settings)
        return
    updated = trained(model, ids, **settings)
    with torch.no_grad():
        expected = updated(input_ids=ids).logits
        assert (expected - model(ids).logits).abs().max() > 1e-4
        updated.save_pretrained(tmp_path / "update")
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "update").eval()
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        merged = updated.merge_and_unload()
        assert type(merged) is LarpMllmForCausalLM
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        again = LarpMllmForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [[5, 8], [101, 103]], ids=["text", "codes"])
def test_rows_of_the_embedding_of_all_ids_cannot_be_trained_alone(model, ids, rows):
    with pytest.raises(ValueError, match=r'whole_embedding has no weights .*{"embed_tokens": .*=\["adapter"\]'):
        trained(model, ids, target_modules=["q_proj"], trainable_token_indices=rows)


def test_lora_of_all_linear_layers_leaves_the_head_alone_and_can_be_merged(model, ids):
    settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    updated = get_peft_model(copy.deepcopy(model), settings).eval()
    assert not any("lm_head" in name for name, _ in updated.named_parameters() if "lora" in name)
    with torch.no_grad():
        expected = updated(input_ids=ids).logits
        torch.testing.assert_close(updated.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_prompt_tuning_reads_the_embedding_of_all_ids(model, ids):
    tuned = get_peft_model(copy.deepcopy(model), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        logits = tuned(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 2:]
    assert torch.equal(logits > EXCLUDED, model(ids).logits > EXCLUDED)
