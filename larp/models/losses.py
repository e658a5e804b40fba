"""The adversarial losses and regularisers of LARP, and PSNR. LPIPS is in `larp.metrics.lpips`.

Shapes: B batch, T frames, H, W pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from larp.models.layers import BaseBlock
from larp.models.noise import BatchNoise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def smooth_targets(noise: BatchNoise) -> tuple[Tensor, Tensor]:
    """Sample smooth labels (B, 1): real max(0.7, 1 - 0.15 |n|), fake min(0.3, 0.15 |n|), with n standard normal."""
    real = (1 - 0.15 * noise.normal(1).abs()).clamp_min(0.7)
    return real, (0.15 * noise.normal(1).abs()).clamp_max(0.3)


def discriminator_loss(real: Tensor, fake: Tensor, noise: BatchNoise | None = None) -> Tensor:
    """Return the non-saturating loss of logits (B, 1) on real and fake clips, a scalar in nats; `noise` smooths the labels."""
    targets = (torch.ones_like(real), torch.zeros_like(fake)) if noise is None else smooth_targets(noise)
    losses = [
        F.binary_cross_entropy_with_logits(logits.float(), t.float())
        for logits, t in zip((real, fake), targets, strict=True)
    ]
    return sum(losses)


def generator_loss(fake: Tensor) -> Tensor:
    """Return the tokenizer's non-saturating loss for the logits (B, 1) on its reconstructions, a scalar in nats."""
    return F.softplus(-fake.float()).mean()


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the hinge loss of logits (B, 1) on real and fake clips, the mean of both sides, a scalar."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """Return the tokenizer's hinge loss: the negative mean of the logits (B, 1) on its reconstructions, a scalar."""
    return -fake.float().mean()


def r1_penalty(discriminator: nn.Module, clip: Tensor) -> Tensor:
    """Return the R1 penalty (Mescheder et al. 2018): the squared norm of d logit / d pixels, mean over clips, a scalar.

    Its gradient reaches the discriminator only. The pass needs several times the memory of a usual one.

    Args:
        discriminator: the raw module, not an engine.
        clip: real clips (B, 3, T, H, W).
    """
    clip = clip.detach().float().requires_grad_()
    # In 16 bits the squares of small gradients underflow.
    with torch.autocast(clip.device.type, enabled=False), _twice_differentiable(discriminator):
        (gradient,) = torch.autograd.grad(discriminator(clip).sum(), clip, create_graph=True)
    return gradient.square().flatten(1).sum(dim=1).mean()


@contextmanager
def _twice_differentiable(module: nn.Module) -> Iterator[None]:
    """Disable what has no second derivative: fused attention, compiled blocks and activation checkpointing."""
    blocks = [part for part in module.modules() if isinstance(part, BaseBlock) and part.checkpointing]
    for block in blocks:
        block.checkpointing = False
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for block in blocks:
            block.checkpointing = True


class LeCam:
    """LeCam regularisation (arXiv 2104.03310): pulls logits towards the running mean of the other side.

    Args:
        decay: of the running means.
    """

    def __init__(self, decay: float = 0.999):
        self.decay, self.real, self.fake = decay, 0.0, 0.0

    def update(self, real: float, fake: float) -> None:
        """Update the running means with the mean logits of a step over all processes."""
        self.real = self.decay * self.real + (1 - self.decay) * real
        self.fake = self.decay * self.fake + (1 - self.decay) * fake

    def __call__(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return the unweighted penalty of logits (B, 1), a scalar. The batch is averaged first, as in the reference."""
        return F.relu(real.float().mean() - self.fake).square() + F.relu(self.real - fake.float().mean()).square()


def check_pair(a: Tensor, b: Tensor, metric: str) -> None:
    """Raise ValueError, naming `metric`, unless both are clips (B, 3, T, H, W) of one shape."""
    if a.shape != b.shape or a.ndim != 5 or a.shape[1] != 3:
        raise ValueError(
            f"{metric}: needs two clips of one shape (B, 3, T, H, W), got {tuple(a.shape)} and {tuple(b.shape)}"
        )


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each clip in dB, (B,) float32, from its mean squared error over all frames.

    The PSNR of a data set is the mean of these values. The mean squared error is at least 1e-10, so equal clips give 100 dB.
    Raises ValueError for shapes that differ.
    """
    check_pair(a, b, "psnr")
    error = (a.float() - b.float()).square().flatten(1).mean(dim=1)
    return -10 * error.clamp(min=1e-10).log10()
