"""Reuse of the last decoder, which normally happens on a GPU only."""

import gc

from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.sampling import reused_decoder
from larp.sampling.options import GuidedSampling
from larp.sampling.sample import generate

import pytest
import torch


@pytest.fixture
def made(monkeypatch):
    """Enable reuse on the CPU; return a list with one entry per decoder built."""
    count = []

    class Counted(reused_decoder.Decoder):
        def __init__(self, *args, **options):
            count.append(args)
            super().__init__(*args, **options)

    monkeypatch.setattr(reused_decoder, "Decoder", Counted)
    monkeypatch.setattr(reused_decoder, "_is_cacheable", lambda parameter: True)
    yield count
    reused_decoder.clear()


def random_generator() -> LarpGenerator:
    torch.manual_seed(0)
    model = LarpGenerator(GeneratorConfig(num_tokens=8, codebook_size=64, depth=2, heads=2, width=32, num_classes=4))
    torch.nn.init.normal_(model.output.weight, std=0.3)
    return model


def test_a_reused_decoder_gives_the_codes_of_a_new_one(made):
    model, first, second = random_generator(), torch.tensor([0]), torch.tensor([1])
    reused = [
        generate(model, first, seed=1),
        generate(model, second, seed=2),
        generate(model, first, GuidedSampling(guidance_scale=2.0)),
    ]
    reused.append(generate(model, first, GuidedSampling(temperature=0.5), seed=1))
    reused.append(generate(model, first, seed=1))
    assert len(made) == 3  # guidance needs two rows
    fresh = []
    for condition, options in (
        (first, dict(seed=1)),
        (second, dict(seed=2)),
        (first, dict(sampling=GuidedSampling(guidance_scale=2.0))),
    ):
        reused_decoder.clear()
        fresh.append(generate(model, condition, **options))
    assert all(torch.equal(a, b) for a, b in zip(reused, fresh, strict=False)) and torch.equal(reused[4], reused[0])


@pytest.mark.parametrize("change", [lambda weight: weight.mul_(2), lambda weight: weight.data.mul_(2)])
@torch.no_grad()
def test_changed_weights_need_a_new_decoder(made, change):
    model, condition = random_generator(), torch.tensor([0])
    generate(model, condition)
    change(model.layers[0].attention.wqkv.weight)
    after = generate(model, condition)
    assert len(made) == 2
    reused_decoder.clear()
    assert torch.equal(after, generate(model, condition))


def test_it_is_deleted_with_the_model_and_after_an_error(made, monkeypatch):
    model, condition = random_generator(), torch.tensor([0])
    generate(model, condition)
    assert len(reused_decoder._last) == 1
    made.clear()
    del model
    gc.collect()
    assert not reused_decoder._last
    with pytest.raises(RuntimeError, match="stop"), reused_decoder.reused_decoder(random_generator(), 1, "auto", None):
        raise RuntimeError("stop")
    assert not reused_decoder._last
