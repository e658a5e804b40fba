"""The training objective of the tokenizer: LARP's weighted losses without the adversarial one (arXiv 2410.21264, 4.1).

Shapes: B batch, T frames, H, W pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from larp.config import check_positive
from larp.models.noise import BatchNoise
from larp.models.tokenizer import TokenizerOutput

import torch
from torch import Tensor

LpipsNet = Literal["vgg16", "alexnet", "both"]


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses; the defaults are the published ones."""

    l1: float = 1.0
    l2: float = 0.0
    lpips: float = 1.0
    """Needs its published weights (docs/evaluation.md, 'Weights of the metrics'), unless it is 0."""
    lpips_net: LpipsNet = "vgg16"
    """Network of LPIPS: VGG16 as published; AlexNet, which leaves frames sharper; or the mean of both. Validation measures with VGG16."""
    lpips_frames: int = 0
    """Number of random frames per clip and step that LPIPS is computed on; 0 takes all."""
    lpips_start: int = 0
    """First step with LPIPS."""
    quantizer: float = 0.1
    """On codebook loss + 0.25 commitment loss."""
    commitment: float = 0.25
    prior: float = 0.06
    gan: float = 0.3
    """0 trains without a discriminator."""
    gan_start: int = 0
    """First step with the discriminator."""
    gan_every: int = 5
    """Steps from one update of the discriminator to the next."""
    gan_kind: Literal["smooth", "plain", "hinge"] = "smooth"
    """`smooth`: non-saturating with smoothed labels; `plain`: with labels 0 and 1; `hinge`."""
    lecam: float = 1e-6
    r1: float = 0.0
    """Weight of the discriminator's R1 penalty; 0 (published) is off. It needs several times an update's memory."""
    r1_every: int = 16
    """Updates of the discriminator from one R1 penalty to the next; its weight is multiplied by the same number."""

    def __post_init__(self) -> None:
        check_positive(self, "gan_every", "r1_every", where="loss.")
        for name in ("l1", "l2", "lpips", "quantizer", "commitment", "prior", "gan", "lecam", "r1"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"loss.{name} = {getattr(self, name)} is a weight: 0 or more, and finite")
        for name in ("lpips_frames", "lpips_start", "gan_start"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} must be 0 or more, got {getattr(self, name)}")
        if self.r1 and not self.gan:
            raise ValueError(
                f"loss.r1 = {self.r1} regularises the discriminator, which loss.gan = 0 leaves out: set one of them"
            )


def tokenizer_loss(
    weights: LossConfig,
    clip: Tensor,
    out: TokenizerOutput,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    noise: BatchNoise | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the tokenizer's loss without its adversarial part, a scalar, and its unweighted terms by name.

    The reconstruction is not clamped: a clamp would stop the gradients where the error is largest.

    Args:
        clip: the target (B, 3, T, H, W), float32 in [0, 1].
        perceptual: maps two clips to their LPIPS (B,); None leaves the term out.
        noise: chooses the frames of `weights.lpips_frames`.
    """
    error = out.reconstruction.float() - clip
    parts = {"l1": error.abs().mean(), "l2": error.square().mean()}
    total = weights.l1 * parts["l1"] + weights.l2 * parts["l2"]
    if perceptual is not None:
        pair = out.reconstruction.float(), clip
        if 0 < weights.lpips_frames < clip.shape[2]:
            frames = (noise.uniform(weights.lpips_frames) * clip.shape[2]).long()
            pair = (pick_frames(video, frames) for video in pair)
        parts["lpips"] = perceptual(*pair).mean()
        total = total + weights.lpips * parts["lpips"]
    if out.quantized is not None:
        parts["quantizer"] = out.quantized.codebook_loss + weights.commitment * out.quantized.commitment_loss
        total = total + weights.quantizer * parts["quantizer"]
    if out.prior is not None:
        parts |= {"prior": out.prior.loss, "prior_top1": out.prior.top1, "prior_top5": out.prior.top5}
        total = total + weights.prior * out.prior.loss
    return total, parts


def pick_frames(clip: Tensor, frames: Tensor) -> Tensor:
    """Select frames (B, n) int64 of each clip (B, 3, T, H, W): (B, 3, n, H, W)."""
    return clip[torch.arange(len(clip), device=clip.device)[:, None], :, frames].transpose(1, 2)
