"""Sampling and resetting of codes, and the random numbers of a batch."""

from larp.models.noise import BatchNoise
from larp.models.quantizer import VectorQuantizer, sample_codes, usage

import pytest
import torch


def test_sampled_codes_are_in_range_for_every_uniform():
    probabilities = torch.tensor([[0.25, 0.0, 0.75], [1.0, 0.0, 0.0]])
    for value in (0.0, 0.2499, 0.5, 1 - 2**-24):
        sampled = sample_codes(probabilities, torch.full((2,), value))
        assert sampled.tolist() == [0 if value < 0.25 else 2, 0], "codes of probability 0 are never sampled"


def test_a_low_temperature_gives_the_nearest_code():
    quantizer = VectorQuantizer(32, 4, temperature=1e-4)
    latents = torch.randn(2, 6, 4)
    out = quantizer(latents, torch.rand(2, 6))
    assert torch.equal(out.codes, quantizer.nearest(latents))
    torch.testing.assert_close(out.latents, quantizer.lookup(out.codes))


def test_half_precision_latents_are_quantized_in_float32():
    quantizer = VectorQuantizer(32, 4)
    latents = torch.randn(2, 6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantizer(latents)
    assert out.latents.dtype == torch.float32 and torch.equal(out.codes, quantizer.nearest(latents))


def test_usage():
    counted = usage(torch.tensor([[0, 1], [2, 3]]), 8)
    assert counted["codes_used"] == 0.5 and counted["perplexity"] == pytest.approx(4)


def test_noise_belongs_to_the_rows_of_the_global_batch():
    whole = BatchNoise(3, 7, 8)
    parts = [BatchNoise(3, 7, 8, offset, 2) for offset in (0, 2, 4, 6)]
    for shape in ((), (5,), (2, 3)):
        assert torch.equal(whole.uniform(*shape), torch.cat([part.uniform(*shape) for part in parts]))
        assert torch.equal(whole.normal(*shape), torch.cat([part.normal(*shape) for part in parts]))
    samples = [BatchNoise(seed, step, 4).uniform(4).flatten() for seed in (0, 1) for step in (0, 1)]
    assert len({round(float(d.sum()), 6) for d in samples}) == 4, "seeds and steps differ"
    with pytest.raises(ValueError, match="global batch of 4"):
        BatchNoise(0, 0, 4, 3, 2)
