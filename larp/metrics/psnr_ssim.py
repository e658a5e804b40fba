"""SSIM of two clips, and the mean-colour baseline of PSNR, which is in `larp.models.losses`; one value per video.

Shapes: B videos, T frames, H x W pixels; clips are float (B, 3, T, H, W) in [0, 1].
"""

from __future__ import annotations

from larp.models.losses import check_pair

import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW = 11
_SIGMA = 1.5


def _gaussian(device: torch.device) -> Tensor:
    offsets = torch.arange(_WINDOW, dtype=torch.float32, device=device) - _WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    return weights / weights.sum()


def _blur(images: Tensor, window: Tensor) -> Tensor:
    images = F.conv2d(images, window.view(1, 1, -1, 1))
    return F.conv2d(images, window.view(1, 1, 1, -1))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity of each video: (B,) float32, mean over frames, channels and pixels.

    Gaussian window of 11x11 with sigma 1.5, no padding, data range 1, constants 0.01 and 0.03, separate channels (Wang
    et al. 2004). Raises ValueError for different shapes and for frames smaller than 11x11.
    """
    check_pair(a, b, "ssim")
    if min(a.shape[-2:]) < _WINDOW:
        raise ValueError(f"ssim: frames of {a.shape[-2]}x{a.shape[-1]} are smaller than the {_WINDOW}x{_WINDOW} window")
    batch, height, width = a.shape[0], a.shape[-2], a.shape[-1]
    x, y = (clip.float().reshape(-1, 1, height, width) for clip in (a, b))
    window = _gaussian(a.device)
    mean_x, mean_y, xx, yy, xy = (_blur(image, window) for image in (x, y, x * x, y * y, x * y))
    variance_x, variance_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    contrast = (2 * covariance + c2) / (variance_x + variance_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * contrast).reshape(batch, -1).mean(dim=1)


def mean_colour(clip: Tensor) -> Tensor:
    """Replace every pixel of a video by the mean over T, H and W of its channel: a baseline for PSNR, same shape."""
    return clip.mean(dim=(2, 3, 4), keepdim=True).expand_as(clip)
