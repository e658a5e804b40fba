"""Sampling and resetting of codes, and the random numbers of a batch."""

from larp.models.noise import BatchNoise
from larp.models.quantizer import CodebookResetter, VectorQuantizer, sample_codes, usage

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


def test_the_resetter_moves_idle_codes_to_latents_and_resumes():
    resetter = CodebookResetter(8, memory=10)
    latents = torch.nn.functional.normalize(torch.randn(3, 4, 4), dim=-1)
    resetter.observe(latents, torch.tensor([[0, 1, 1, 2]] * 3))
    assert resetter.idle().tolist() == [3, 4, 5, 6, 7] and len(resetter.latents) == 10
    other = CodebookResetter(8, memory=10)
    other.load_state_dict(resetter.state_dict())
    codebook = torch.nn.functional.normalize(torch.randn(8, 4), dim=-1)
    renewed = resetter.resample(codebook, resetter.idle(), seed=1)
    assert torch.equal(renewed, other.resample(codebook, other.idle(), seed=1))
    assert torch.equal(renewed[:3], codebook[:3]) and not torch.isclose(renewed[3:], codebook[3:]).all(-1).any()
    nearest = (renewed[3:] @ latents.flatten(0, 1).T).amax(-1)
    assert (nearest > 0.98).all(), "the codes are reset to latents"
    assert len(resetter.idle()) == 8, "the counts are reset"


def test_clustering_fits_the_latents():
    centres = torch.nn.functional.normalize(torch.randn(16, 4), dim=-1)
    resetter = CodebookResetter(16, memory=4000)
    latents = centres.repeat(100, 1) + 0.01 * torch.randn(1600, 4)
    resetter.observe(torch.nn.functional.normalize(latents, dim=-1)[None], None)
    codebook = resetter.cluster(seed=1)
    torch.testing.assert_close(codebook.norm(dim=-1), torch.ones(16))
    assert torch.equal(codebook, resetter.cluster(seed=1)), "every process makes the same choice"
    fit = [(resetter.latents @ resetter.cluster(n, seed=1).T).amax(-1).mean().item() for n in (0, 1, 3, 10)]
    assert fit == sorted(fit) and fit[-1] > fit[0] + 0.01, "each iteration brings the codes nearer to the latents"


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
