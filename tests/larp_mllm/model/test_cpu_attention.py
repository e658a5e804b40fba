"""The attention of trainings on CPUs equals transformers' own but for rounding, and leaves no trace in a written model."""

import json

from larp_mllm.model import cpu_attention
from larp_mllm.model.cpu_attention import NAME, use_cpu_attention
from tests.larp_mllm.families import FAMILIES
from tests.larp_mllm.tiny import tiny_mllm

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture
def used(monkeypatch):
    """As on a processor where it is faster."""
    monkeypatch.setattr(cpu_attention, "fused_is_slow", lambda: True)


def gradients(base, positions):
    ids = torch.arange(positions.shape[1])[None].expand_as(positions) % 90
    with torch.autocast("cpu", torch.bfloat16):
        hidden = base.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    base.zero_grad()
    hidden.float().square().mean().backward()
    return hidden.detach().float(), {name: p.grad for name, p in base.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "family", ["qwen2-sliding", "qwen3-tied", "llama2", "llama3-tied", "mistral-sliding", "smollm"]
)
def test_hidden_states_and_gradients_are_those_of_transformers(family, packed, used):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(FAMILIES[family]()).train()
    positions = torch.cat([torch.arange(14), torch.arange(10)]) if packed else torch.arange(24)
    wanted = gradients(base, positions.repeat(2, 1))
    use_cpu_attention(base)
    assert base.config._attn_implementation == NAME
    found = gradients(base, positions.repeat(2, 1))
    assert not torch.equal(found[0], wanted[0]), "not used"
    assert (found[0] - wanted[0]).norm() < 0.02 * wanted[0].norm()
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).norm() <= 0.05 * gradient.norm() + 1e-6, name


def test_without_gradients_or_in_float32_it_is_transformers_own(used):
    base = tiny_mllm().model.base
    ids = torch.arange(8)[None] + 4
    with torch.no_grad():
        wanted = base(ids).logits
        use_cpu_attention(base)
        assert torch.equal(base(ids).logits, wanted)
        generated = base.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(base(ids).logits, wanted) and generated.shape == (1, 12)


def test_it_is_chosen_only_where_it_is_faster(monkeypatch):
    for slow in (False, True):
        monkeypatch.setattr(cpu_attention, "fused_is_slow", lambda slow=slow: slow)
        base = tiny_mllm().model.base
        base.set_attn_implementation("eager")
        use_cpu_attention(base)
        assert base.config._attn_implementation == "eager"
        base.set_attn_implementation("sdpa")
        use_cpu_attention(base)
        assert base.config._attn_implementation == (NAME if slow else "sdpa")


def test_a_written_model_does_not_name_it(tmp_path, used):
    mllm = tiny_mllm()
    use_cpu_attention(mllm.model.base)
    mllm.save(tmp_path / "model")
    assert NAME not in json.dumps(json.loads((tmp_path / "model/config.json").read_text()))
