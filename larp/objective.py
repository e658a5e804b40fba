"""What a tokenizer is trained for: LARP's weighted losses, and the discriminator that takes part in them (arXiv 2410.21264, 4.1).

Shapes: B batch, T frames, H, W pixels.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from larp.discriminator import Discriminator, DiscriminatorConfig
from larp.engine import backend
from larp.engine.backend import Engine
from larp.losses import (
    LeCam,
    discriminator_loss,
    generator_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    r1_penalty,
)
from larp.metrics.lpips import Lpips
from larp.noise import BatchNoise
from larp.tokenizer import TokenizerConfig, TokenizerOutput

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses; the defaults are the published ones."""

    l1: float = 1.0
    l2: float = 0.0
    lpips: float = 1.0
    """Needs its published weights (docs/evaluation.md, 'Weights of the metrics'); 0 does without."""
    lpips_frames: int = 0
    """LPIPS of so many random frames of each clip, others at each step; 0: of all."""
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
    """The discriminator is updated every so many steps."""
    gan_kind: Literal["smooth", "plain", "hinge"] = "smooth"
    """`smooth`: non-saturating with smoothed labels; `plain`: with labels 0 and 1; `hinge`."""
    lecam: float = 1e-6
    r1: float = 0.0
    """Of the R1 regularisation of the discriminator; 0 is off (published). It takes several times an update's memory."""
    r1_every: int = 16
    """R1 is computed once in so many updates of the discriminator, with so many times its weight."""

    def __post_init__(self) -> None:
        for name in ("gan_every", "r1_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"loss.{name} must be at least 1, got {getattr(self, name)}")
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


@dataclass(frozen=True)
class AdversaryConfig:
    """Size and learning rate of the discriminator."""

    hidden: int = 512
    depth: int = 12
    heads: int = 8
    lr: float = 3e-5

    def discriminator(self, model: TokenizerConfig) -> DiscriminatorConfig:
        """The discriminator for the clips of a tokenizer."""
        return DiscriminatorConfig(*model.clip_shape, model.patch_size, self.hidden, self.depth, self.heads)


def tokenizer_loss(
    weights: LossConfig,
    clip: Tensor,
    out: TokenizerOutput,
    perceptual: Lpips | None = None,
    noise: BatchNoise | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the tokenizer's loss but for its adversarial part, a scalar, and its unweighted parts by name.

    The reconstruction is taken as it is, unclamped: a clamp would stop gradients where it errs most. `noise` chooses the frames
    where `weights.lpips_frames` asks for some.
    """
    error = out.reconstruction.float() - clip
    parts = {"l1": error.abs().mean(), "l2": error.square().mean()}
    total = weights.l1 * parts["l1"] + weights.l2 * parts["l2"]
    if perceptual is not None:
        seen = out.reconstruction.float(), clip
        if 0 < weights.lpips_frames < clip.shape[2]:
            frames = (noise.uniform(weights.lpips_frames) * clip.shape[2]).long()
            seen = (pick_frames(video, frames) for video in seen)
        parts["lpips"] = perceptual(*seen).mean()
        total = total + weights.lpips * parts["lpips"]
    if out.quantized is not None:
        parts["quantizer"] = out.quantized.codebook_loss + weights.commitment * out.quantized.commitment_loss
        total = total + weights.quantizer * parts["quantizer"]
    if out.prior is not None:
        parts |= {"prior": out.prior.loss, "prior_top1": out.prior.top1, "prior_top5": out.prior.top5}
        total = total + weights.prior * out.prior.loss
    return total, parts


def pick_frames(clip: Tensor, frames: Tensor) -> Tensor:
    """Take the frames (B, n) int64 of each clip (B, 3, T, H, W): (B, 3, n, H, W)."""
    return clip[torch.arange(len(clip), device=clip.device)[:, None], :, frames].transpose(1, 2)


class Adversary:
    """A discriminator in its own engine, which learns to tell reconstructions from clips, and judges them for the tokenizer.

    Args:
        engine: of a `Discriminator`, at zero_stage 0 to 2: at stage 3 the raw module gives wrong gradients in silence.
    """

    def __init__(self, engine: Engine, weights: LossConfig):
        self.engine, self.weights = engine, weights
        self.lecam = LeCam()

    @property
    def discriminator(self) -> Discriminator:
        """The raw module."""
        return self.engine.module

    def takes_part(self, place: float) -> bool:
        """Whether the tokenizer feels the discriminator at this place on the schedule."""
        return place >= self.weights.gan_start

    def learns(self, place: float, step: int) -> bool:
        """Whether the discriminator is updated at this place on the schedule, at this step."""
        return self.takes_part(place) and step % self.weights.gan_every == 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the discriminator fixed: around `judge` and the backward pass of its loss, where checkpointed blocks run again."""
        free = [p for p in self.discriminator.parameters() if p.requires_grad]
        for p in free:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in free:
                p.requires_grad_(True)

    def judge(self, reconstruction: Tensor) -> Tensor:
        """Return the tokenizer's adversarial loss, a scalar, through the raw discriminator held fixed for this pass."""
        with self.held(), self.engine.autocast():
            fake = self.discriminator(reconstruction)
        return hinge_generator_loss(fake) if self.weights.gan_kind == "hinge" else generator_loss(fake)

    def learn(self, clip: Tensor, reconstruction: Tensor, noise: BatchNoise) -> Tensor:
        """Train the discriminator on clips and detached reconstructions (B, 3, T, H, W); return its loss, a scalar.

        To be called for each micro batch of a step. The loss is all of it: LeCam and, where it is due, R1 included.
        """
        # One pass for both sides: an engine's forward runs once for each backward.
        real, fake = self.engine(torch.cat([clip, reconstruction])).chunk(2)
        loss = self.verdict(real, fake, noise) + self.weights.lecam * self.lecam(real, fake)
        if self.weights.r1 and self.engine.step_count % self.weights.r1_every == 0:
            # The same backward pass takes both: an engine counts one for each micro batch.
            loss = loss + self.weights.r1 * self.weights.r1_every * r1_penalty(self.discriminator, clip)
        self.engine.backward(loss)
        self.engine.step()
        means = backend.reduce_mean({"real": real.detach().mean(), "fake": fake.detach().mean()})
        self.lecam.update(means["real"], means["fake"])
        return loss

    def verdict(self, real: Tensor, fake: Tensor, noise: BatchNoise) -> Tensor:
        """Return the discriminator's adversarial loss for logits (B, 1), a scalar."""
        if self.weights.gan_kind == "hinge":
            return hinge_discriminator_loss(real, fake)
        return discriminator_loss(real, fake, noise if self.weights.gan_kind == "smooth" else None)

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint holds beside the engine."""
        return {"lecam_real": self.lecam.real, "lecam_fake": self.lecam.fake}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up a `state_dict`."""
        self.lecam.real, self.lecam.fake = state["lecam_real"], state["lecam_fake"]
