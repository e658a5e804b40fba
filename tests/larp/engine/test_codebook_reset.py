"""Unused codes are reset to recent latents."""

from larp.engine.codebook_reset import CodebookResetter

import torch


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
