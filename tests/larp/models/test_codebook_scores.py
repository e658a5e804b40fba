"""Scores made in parts: the loss, gradient, accuracies and samples of those held whole."""

from larp.models import codebook_scores as codescores
from larp.models.codebook_scores import sample_in_blocks, score_codes
from larp.models.noise import BatchNoise
from larp.models.prior import ARPrior, PriorConfig
from larp.models.quantizer import VectorQuantizer, sample_codes

import pytest
import torch
import torch.nn.functional as F

ROWS, CODES = 37, 256


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Ten rows at a time, and a rest."""
    monkeypatch.setattr(codescores, "_ELEMENTS", 10 * CODES)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_loss_gradient_and_ranks_are_those_of_the_whole(scale):
    predictions = (scale * F.normalize(torch.randn(ROWS, 8), dim=-1)).requires_grad_()
    codebook, targets = F.normalize(torch.randn(CODES, 8), dim=-1), torch.randint(CODES, (ROWS,))
    scores = predictions @ codebook.T
    loss = F.cross_entropy(scores, targets)
    (wanted,) = torch.autograd.grad(3 * loss, predictions)
    found = score_codes(predictions, codebook, targets, ranked=True)
    (gradient,) = torch.autograd.grad(3 * found.loss, predictions)
    torch.testing.assert_close(found.loss, loss)
    torch.testing.assert_close(gradient, wanted)
    places = scores.argsort(-1, descending=True)
    assert torch.equal(found.ranks, (places == targets[:, None]).int().argmax(-1)) and found.sampled.numel() == 0


@pytest.mark.parametrize("codes", [CODES, 100])
def test_draws_are_those_of_the_whole_but_for_rounding(codes):
    probabilities, uniform = (4 * torch.randn(4000, codes)).softmax(-1), torch.rand(4000)
    sampled, wanted = sample_in_blocks(probabilities, uniform), sample_codes(probabilities, uniform)
    assert (sampled == wanted).float().mean() > 0.999 and sampled.shape == (4000,)
    ends = sample_in_blocks(probabilities, torch.tensor([0.0, 1 - 2**-24]).repeat(2000))
    assert ends.min() >= 0 and ends.max() < codes


def test_a_code_without_probability_is_never_drawn():
    probabilities = torch.zeros(3, CODES)
    probabilities[0, 0] = probabilities[1, 130] = probabilities[2, 200] = 1.0
    for uniform in (0.0, 0.5, 1 - 2**-24):
        assert sample_in_blocks(probabilities, torch.full((3,), uniform)).tolist() == [0, 130, 200]


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_the_prior_is_the_same_in_parts(mix, monkeypatch):
    prior = ARPrior(PriorConfig(depth=1, heads=2, width=16, positions=9, dropout=0.0, temperature=0.1), 8)
    quantizer = VectorQuantizer(CODES, 8)
    codes = torch.randint(CODES, (5, 9))
    results = []
    for parts in (False, True):
        if parts:
            monkeypatch.setattr(ARPrior, "_score", ARPrior._score_in_parts)
        latents = quantizer.lookup(codes).detach().requires_grad_()
        result = prior(latents, codes, quantizer.codebook().detach(), mix, BatchNoise(0, 0, 5))
        results.append((*result, *torch.autograd.grad(result.loss, (latents, *prior.parameters()))))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
