"""A few training steps at the shape of Qwen2-0.5B with random weights: adapter, then LoRA, within 10 GB of memory."""

import resource

from larp_mllm.engine.lora import prepare_training
from larp_mllm.model.modeling import LarpMllmForCausalLM

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

N, K = 144, 8192


def qwen2_half_billion() -> Qwen2Config:
    """The published config of Qwen2-0.5B."""
    sizes = dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2)
    sizes |= dict(intermediate_size=4864, vocab_size=151_936, max_position_embeddings=131_072, max_window_layers=24)
    return Qwen2Config(**sizes, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6})


@pytest.mark.slow
@pytest.mark.long
def test_the_adapter_and_then_lora_learn_at_the_shape_of_qwen2():
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(qwen2_half_billion())
    assert base.num_parameters() == 494_032_768
    model = LarpMllmForCausalLM.from_base(base, 151_646, torch.randn(K, 16), N)
    assert model.vocabulary.video_start == 151_936
    words = torch.randint(0, 151_000, (1, 12))
    spans = [model.vocabulary.span(torch.randint(0, K, (N,)).tolist()) for _ in range(1)]
    ids = torch.cat([words, torch.tensor(spans)], dim=1)
    text = model(words).logits[..., :151_936]
    prepare_training(model, "adapter")
    assert steps(model, ids, 2, 1e-5) > 0
    assert torch.equal(model(words).logits[..., :151_936], text)
    prepare_training(model, "lora", 8)
    assert steps(model, ids, 2, 1e-5) > 0
    assert not torch.equal(model(words).logits[..., :151_936], text)
    # In kB. The rest of 24 GB is for optimizer states and longer batches.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 10 * 2**20


def steps(model: LarpMllmForCausalLM, ids: torch.Tensor, count: int, rate: float) -> float:
    """Train `count` steps of AdamW; returns the decrease of the loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(count):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0] - losses[-1]
