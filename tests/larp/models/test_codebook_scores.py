"""Scores computed in chunks give the same loss, gradient, ranks and samples as whole tensors."""

from larp.models import codebook_scores
from larp.models.codebook_scores import sample_in_blocks, score_codes
from larp.models.noise import BatchNoise
from larp.models.prior import ARPrior, PriorConfig
from larp.models.quantizer import VectorQuantizer, sample_codes

import pytest
import torch
import torch.nn.functional as F

ROWS, CODES = 37, 256


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Use chunks of ten rows, the last one smaller."""
    monkeypatch.setattr(codebook_scores, "_CHUNK_ELEMENTS", 10 * CODES)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_loss_gradient_and_ranks_equal_those_of_a_whole_tensor(scale):
    predictions = (scale * F.normalize(torch.randn(ROWS, 8), dim=-1)).requires_grad_()
    codebook, targets = F.normalize(torch.randn(CODES, 8), dim=-1), torch.randint(CODES, (ROWS,))
    scores = predictions @ codebook.T
    loss = F.cross_entropy(scores, targets)
    (expected,) = torch.autograd.grad(3 * loss, predictions)
    found = score_codes(predictions, codebook, targets, with_ranks=True)
    (gradient,) = torch.autograd.grad(3 * found.loss, predictions)
    torch.testing.assert_close(found.loss, loss)
    torch.testing.assert_close(gradient, expected)
    places = scores.argsort(-1, descending=True)
    assert torch.equal(found.ranks, (places == targets[:, None]).int().argmax(-1)) and found.sampled.numel() == 0


@pytest.mark.parametrize("codes", [CODES, 100])
def test_samples_equal_those_of_a_whole_tensor_up_to_rounding(codes):
    probabilities, uniform = (4 * torch.randn(4000, codes)).softmax(-1), torch.rand(4000)
    sampled, expected = sample_in_blocks(probabilities, uniform), sample_codes(probabilities, uniform)
    assert (sampled == expected).float().mean() > 0.999 and sampled.shape == (4000,)
    ends = sample_in_blocks(probabilities, torch.tensor([0.0, 1 - 2**-24]).repeat(2000))
    assert ends.min() >= 0 and ends.max() < codes


def test_a_code_of_probability_0_is_never_sampled():
    probabilities = torch.zeros(3, CODES)
    probabilities[0, 0] = probabilities[1, 130] = probabilities[2, 200] = 1.0
    for uniform in (0.0, 0.5, 1 - 2**-24):
        assert sample_in_blocks(probabilities, torch.full((3,), uniform)).tolist() == [0, 130, 200]


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_the_prior_is_the_same_in_chunks(mix, monkeypatch):
    prior = ARPrior(PriorConfig(depth=1, heads=2, width=16, positions=9, dropout=0.0, temperature=0.1), 8)
    quantizer = VectorQuantizer(CODES, 8)
    codes = torch.randint(CODES, (5, 9))
    results = []
    for chunked in (False, True):
        if chunked:
            monkeypatch.setattr(ARPrior, "_score", ARPrior._score_in_chunks)
        latents = quantizer.lookup(codes).detach().requires_grad_()
        result = prior(latents, codes, quantizer.codebook().detach(), mix, BatchNoise(0, 0, 5))
        results.append((*result, *torch.autograd.grad(result.loss, (latents, *prior.parameters()))))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-6)
