"""Every family of base models: text logits unchanged, packed records separate, gradients, saving, generation."""

from larp_mllm.model.modeling import LarpMllmForCausalLM
from tests.larp_mllm.families import FAMILIES, VOCAB_SIZE

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

N, K = 4, 16
TEXT = torch.randint(0, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(0))


def base_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()


def model_of(family: str, adapter: str = "codebook") -> LarpMllmForCausalLM:
    return LarpMllmForCausalLM.from_base(base_of(family), VOCAB_SIZE - 5, torch.randn(K, 4), N, adapter).eval()


def record(model: LarpMllmForCausalLM, seed: int, text: int) -> torch.Tensor:
    """Ids: so many of text, a video, and one more of text."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, VOCAB_SIZE, (text + 1,), generator=generator).tolist()
    codes = torch.randint(0, K, (N,), generator=generator).tolist()
    return torch.tensor([*words[:-1], *model.vocabulary.span(codes), words[-1]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_base_gives_its_own_text_logits_to_the_bit_before_and_after_training(family):
    expected = base_of(family)(TEXT).logits
    model = model_of(family)
    model.base.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.stack([record(model, seed, 5) for seed in range(2)])
    losses = []
    for _ in range(3):
        assert torch.equal(model(TEXT).logits[..., :VOCAB_SIZE], expected)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(model(TEXT).logits[..., :VOCAB_SIZE], expected)


@pytest.mark.parametrize(
    "family, attention",
    [*((family, "sdpa") for family in FAMILIES), ("qwen2-tied", "eager"), ("mistral-sliding", "eager")],
)
def test_packed_records_do_not_attend_to_each_other(family, attention):
    model = model_of(family)
    model.base.set_attn_implementation(attention)
    records = [record(model, seed, text) for seed, text in ((0, 3), (1, 9), (2, 6))]
    apart = torch.cat([model(one[None]).logits[0] for one in records])
    positions = torch.cat([torch.arange(len(one)) for one in records])
    # Two rows with different boundaries, which must not affect each other.
    rows = [torch.cat(records), torch.cat(records[::-1])]
    position_ids = [positions, torch.cat([torch.arange(len(one)) for one in records[::-1]])]
    packed = model(torch.stack(rows), position_ids=torch.stack(position_ids)).logits
    torch.testing.assert_close(packed[0], apart, rtol=1e-4, atol=1e-5)
    unseparated = model(rows[0][None]).logits[0]
    assert (unseparated - apart)[len(records[0]) :].abs().max() > 1e-3


@pytest.mark.parametrize("family, adapter", [*((family, "codebook") for family in FAMILIES), ("llama2", "free")])
def test_a_saved_model_loads_unchanged(family, adapter, tmp_path):
    model = model_of(family, adapter)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = record(model, 0, 5)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.config.vocabulary == model.vocabulary
    tied = again.base.get_output_embeddings().weight is again.base.get_input_embeddings().weight
    assert tied == FAMILIES[family]().tie_word_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients_for_every_parameter(family):
    found = []
    for checkpointing in (False, True):
        model = model_of(family).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = torch.stack([record(model, seed, 5) for seed in range(2)])
        loss = model(ids, labels=ids).loss
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert [name for name, gradient in gradients.items() if gradient is None] == []
        for part in ("adapter.code_input.residual", "adapter.code_output.residual", "base.model.layers.0.self_attn.q"):
            assert any(g.abs().max() > 0 for name, g in gradients.items() if name.startswith(part)), part
        found.append((loss.detach(), gradients))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_equals_generation_without(family):
    model = model_of(family)
    ids = torch.stack([record(model, seed, 4) for seed in range(2)])
    settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None)
    generated = [model.generate(ids, use_cache=cached, pad_token_id=0, **settings) for cached in (True, False)]
    assert generated[0].shape[1] == ids.shape[1] + 6
    assert torch.equal(*generated)


@pytest.mark.parametrize(
    "family, attention", [*((family, "sdpa") for family in FAMILIES), ("llama2", "eager"), ("mistral-sliding", "eager")]
)
def test_a_loaded_model_generates_the_same_with_a_static_cache(family, attention, tmp_path):
    model_of(family).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    model.base.set_attn_implementation(attention)
    with torch.no_grad():
        for layer in model.base.base_model.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.mul_(8)  # so that attention matters
    ids = torch.stack([record(model, seed, 4) for seed in range(2)])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    settings = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    settings |= dict(return_dict_in_generate=True, output_logits=True)
    for rows in (slice(0, 1), slice(0, 2)):
        grown, static = (
            model.generate(ids[rows], attention_mask=mask[rows], cache_implementation=cache, **settings)
            for cache in ("dynamic", "static")
        )
        torch.testing.assert_close(torch.stack(static.logits), torch.stack(grown.logits), rtol=1e-4, atol=1e-4)
