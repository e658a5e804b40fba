"""Classifier-free guidance over the codes of a clip, with a scale that may change along it.

Shapes: B rows, N codes, K codebook size.
"""

import math

from larp.sampling.options import GuidedSampling

import torch
from torch import Tensor


def guidance_scales(sampling: GuidedSampling, count: int) -> Tensor:
    """Return the guidance scale of each of `count` codes, float32; 1 is off. Raises ValueError if no code is guided."""
    start, stop, final = sampling.guidance_start, sampling.guidance_stop, sampling.guidance_final
    # 1e-6 less, because 0.7 * 10 is 7.000000000000001 in floating point.
    first, last = (math.ceil(share * count - 1e-6) for share in (start, stop))
    if first >= last:
        raise ValueError(
            f"guidance runs from {start} to {stop}, which holds none of a clip's {count} codes: move start and stop apart"
        )
    scales = torch.ones(count)
    final = sampling.guidance_scale if final is None else final
    scales[first:last] = torch.linspace(sampling.guidance_scale, final, last - first)
    scales[last - 1] = final
    return scales


def apply_guidance(logits: Tensor, scale: float | Tensor) -> Tensor:
    """Return `unconditional + scale * (conditional - unconditional)`, (B, K), of logits (2 B, K), conditional first.

    A scale of 1 returns the conditional logits bit for bit.
    """
    conditional, unconditional = logits.chunk(2)
    return torch.lerp(unconditional, conditional, scale)
