"""The decoder that is kept on a GPU; here the CPU stands for one."""

import gc

from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.sampling import reused_decoder
from larp.sampling.sample import generate

import pytest
import torch


@pytest.fixture
def made(monkeypatch):
    """How many decoders were made; all are kept."""
    count = []

    class Counted(reused_decoder.Decoder):
        def __init__(self, *args, **options):
            count.append(args)
            super().__init__(*args, **options)

    monkeypatch.setattr(reused_decoder, "Decoder", Counted)
    monkeypatch.setattr(reused_decoder, "_lasting", lambda parameter: True)
    yield count
    reused_decoder.forget()


def sampled() -> LarpGenerator:
    torch.manual_seed(0)
    model = LarpGenerator(GeneratorConfig(num_tokens=8, codebook_size=64, depth=2, heads=2, width=32, num_classes=4))
    torch.nn.init.normal_(model.output.weight, std=0.3)
    return model


def test_the_next_clips_take_the_same_decoder_and_are_those_of_a_new_one(made):
    model, first, second = sampled(), torch.tensor([0]), torch.tensor([1])
    kept = [generate(model, first, seed=1), generate(model, second, seed=2), generate(model, first, guidance=2.0)]
    kept.append(generate(model, first, seed=1, temperature=0.5))
    kept.append(generate(model, first, seed=1))
    assert len(made) == 3  # guidance wants two rows
    fresh = []
    for condition, options in ((first, dict(seed=1)), (second, dict(seed=2)), (first, dict(guidance=2.0))):
        reused_decoder.forget()
        fresh.append(generate(model, condition, **options))
    assert all(torch.equal(a, b) for a, b in zip(kept, fresh, strict=False)) and torch.equal(kept[4], kept[0])


@pytest.mark.parametrize("change", [lambda weight: weight.mul_(2), lambda weight: weight.data.mul_(2)])
@torch.no_grad()
def test_changed_weights_take_a_new_one(made, change):
    model, condition = sampled(), torch.tensor([0])
    generate(model, condition)
    change(model.layers[0].attention.wqkv.weight)
    after = generate(model, condition)
    assert len(made) == 2
    reused_decoder.forget()
    assert torch.equal(after, generate(model, condition))


def test_it_goes_with_the_model_and_with_an_error(made, monkeypatch):
    model, condition = sampled(), torch.tensor([0])
    generate(model, condition)
    assert len(reused_decoder._last) == 1
    made.clear()
    del model
    gc.collect()
    assert not reused_decoder._last
    with pytest.raises(RuntimeError, match="stop"), reused_decoder.reused_decoder(sampled(), 1, "auto", None):
        raise RuntimeError("stop")
    assert not reused_decoder._last
