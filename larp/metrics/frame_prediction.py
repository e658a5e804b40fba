"""How well predicted frames follow from given ones, and what it takes to beat doing nothing.

Shapes: B clips, T frames of which G are given, P = T - G predicted ones, H x W pixels; clips are float (B, 3, T, H, W) in [0, 1].
"""

from __future__ import annotations

import math
from typing import Any

from larp.data.extraction import repeat_last
from larp.models.losses import psnr
from larp.models.tokenizer import LarpTokenizer

from torch import Tensor

PREDICTION, COPY, RECONSTRUCTION = "prediction", "copy of the last given frame", "reconstruction"
# What a generator reaches that writes the codes it was given: copying, at the sharpness that codes allow.
CODED_COPY = "copy through the tokenizer"
BASELINES = (COPY, CODED_COPY, RECONSTRUCTION)
WAYS = (PREDICTION, *BASELINES)


def baselines(
    tokenizer: LarpTokenizer, clip: Tensor, given: int, given_codes: Tensor, codes: Tensor
) -> dict[str, Tensor]:
    """Clips (B, 3, T, H, W) without a prediction: the last of the first `given` frames held still, the same through the
    tokenizer, and the tokenizer's reconstruction, which is the ceiling of what codes can show.

    given_codes, codes: (B, N) of `repeat_last(clip, given)` and of the clip.
    """
    return {
        COPY: repeat_last(clip, given),
        CODED_COPY: tokenizer.decode(given_codes),
        RECONSTRUCTION: tokenizer.decode(codes),
    }


def as_frames(clip: Tensor, given: int) -> Tensor:
    """The predicted frames of clips (B, 3, T, H, W) as clips of one frame, (B * P, 3, 1, H, W)."""
    return clip[:, :, given:].transpose(1, 2).flatten(0, 1)[:, :, None]


def frame_psnr(clip: Tensor, made: Tensor, given: int) -> Tensor:
    """PSNR in dB of each predicted frame of `made` against that of `clip`: (B, P) float64 on the CPU."""
    return psnr(as_frames(clip, given), as_frames(made, given)).view(len(clip), -1).double().cpu()


def paired_gain(gain: Tensor) -> dict[str, Any]:
    """The mean of differences (n,) with its 95 % interval, and the share of positive ones; n at least 2."""
    mean, reach = gain.mean().item(), 1.96 * gain.std().item() / math.sqrt(len(gain))
    return {
        "mean": mean,
        "interval_95": [mean - reach, mean + reach],
        "share_of_clips": (gain > 0).double().mean().item(),
    }


def psnr_figures(values: dict[str, Tensor]) -> dict[str, Any]:
    """Figures of PSNRs (n, P) of predicted frames, by the way in which these were made: over clips and frames the mean,
    frame by frame, and the median over clips, since a frame that is copied exactly counts as 100 dB.
    """
    return {
        "mean": {way: v.mean().item() for way, v in values.items()},
        "median": {way: v.mean(dim=1).median().item() for way, v in values.items()},
        "per_frame": {way: v.mean(dim=0).tolist() for way, v in values.items()},
    }
