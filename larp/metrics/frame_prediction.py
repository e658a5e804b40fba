"""Quality of predicted frames, compared with copying the last given frame and with reconstruction.

Shapes: B clips of T frames: G given and P = T - G predicted ones; H x W pixels; N codes. Clips are float
(B, 3, T, H, W) in [0, 1].
"""

from __future__ import annotations

from typing import Any

from larp.data.extraction import repeat_last
from larp.metrics.intervals import clustered_mean
from larp.models.losses import psnr
from larp.models.tokenizer import LarpTokenizer

from torch import Tensor

PREDICTION, COPY, RECONSTRUCTION = "prediction", "copy of the last given frame", "reconstruction"
# The result of a generator that repeats the given codes: a copy with the sharpness of the tokenizer.
CODED_COPY = "copy through the tokenizer"
BASELINES = (COPY, CODED_COPY, RECONSTRUCTION)
WAYS = (PREDICTION, *BASELINES)


def baselines(
    tokenizer: LarpTokenizer, clip: Tensor, given: int, given_codes: Tensor, codes: Tensor
) -> dict[str, Tensor]:
    """Return the baselines (B, 3, T, H, W) by name: the last given frame repeated, the same through the tokenizer, and the
    reconstruction of the clip, an upper bound for codes.

    given_codes, codes: codes (B, N) of `repeat_last(clip, given)` and of the clip.
    """
    return {
        COPY: repeat_last(clip, given),
        CODED_COPY: tokenizer.decode(given_codes),
        RECONSTRUCTION: tokenizer.decode(codes),
    }


def as_frames(clip: Tensor, given: int) -> Tensor:
    """Return the predicted frames of clips (B, 3, T, H, W) as clips of one frame, (B * P, 3, 1, H, W)."""
    return clip[:, :, given:].transpose(1, 2).flatten(0, 1)[:, :, None]


def frame_psnr(clip: Tensor, predicted: Tensor, given: int) -> Tensor:
    """Return the PSNR in dB of each predicted frame against that of `clip`: (B, P) float64 on the CPU."""
    return psnr(as_frames(clip, given), as_frames(predicted, given)).view(len(clip), -1).double().cpu()


def paired_gain(gain: Tensor, sources: Tensor) -> dict[str, Any]:
    """Return `clustered_mean` of differences (n,) of clips with these sources, int64 (n,), and the share of positive ones."""
    return clustered_mean(gain, sources) | {"share_of_clips": (gain > 0).double().mean().item()}


def psnr_figures(values: dict[str, Tensor]) -> dict[str, Any]:
    """Return mean, median over clips, and mean per frame of PSNRs (n, P), each by the method that made the frames.

    The median is robust to exactly copied frames, which have 100 dB.
    """
    return {
        "mean": {way: v.mean().item() for way, v in values.items()},
        "median": {way: v.mean(dim=1).median().item() for way, v in values.items()},
        "per_frame": {way: v.mean(dim=0).tolist() for way, v in values.items()},
    }
