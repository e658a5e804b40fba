"""PSNR against its definition, SSIM against pytorch_msssim."""

from larp.metrics.psnr_ssim import mean_colour, ssim
from larp.models.losses import psnr

import pytest
import torch


def clip(seed: int, batch: int = 2, frames: int = 3, size: int = 24) -> torch.Tensor:
    return torch.rand(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(seed))


def test_psnr_is_per_video():
    a = torch.zeros(2, 3, 4, 8, 8)
    b = torch.stack([torch.full((3, 4, 8, 8), 0.1), torch.full((3, 4, 8, 8), 0.01)])
    torch.testing.assert_close(psnr(a, b), torch.tensor([20.0, 40.0]))
    assert psnr(a, a).tolist() == [100.0, 100.0]


def test_psnr_takes_the_error_over_the_whole_video():
    a, b = torch.zeros(1, 3, 2, 8, 8), torch.zeros(1, 3, 2, 8, 8)
    b[:, :, 1] = 0.2
    assert float(psnr(a, b)) == pytest.approx(-10 * torch.tensor(0.02).log10().item(), abs=1e-4)


def test_ssim_agrees_with_pytorch_msssim():
    oracle = pytest.importorskip("pytorch_msssim")
    a = clip(0)
    b = (a + 0.2 * clip(1) - 0.1).clamp(0, 1)
    frames = [x.transpose(1, 2).reshape(-1, 3, 24, 24) for x in (a, b)]
    expected = oracle.ssim(*frames, data_range=1.0, size_average=False).view(2, 3).mean(dim=1)
    torch.testing.assert_close(ssim(a, b), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ssim(a, a), torch.ones(2))


def test_mean_colour_is_per_video():
    a = clip(2)
    painted = mean_colour(a)
    assert painted.shape == a.shape
    torch.testing.assert_close(painted[1, 2, 0, 0, 0], a[1, 2].mean())
    assert float(painted[0, 0].std()) < 1e-6


def test_errors():
    with pytest.raises(ValueError, match=r"psnr.*one shape"):
        psnr(clip(0), clip(0, frames=2))
    with pytest.raises(ValueError, match=r"ssim.*one shape"):
        ssim(torch.zeros(1, 1, 2, 16, 16), torch.zeros(1, 1, 2, 16, 16))
    with pytest.raises(ValueError, match="8x8 are smaller than the 11x11"):
        ssim(clip(0, size=8), clip(0, size=8))
