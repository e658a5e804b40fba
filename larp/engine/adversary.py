"""The discriminator that takes part in a tokenizer's training, in an engine of its own (arXiv 2410.21264, 4.1).

Shapes: B batch, T frames, H, W pixels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from larp.engine import backend
from larp.engine.backend import Engine, Ranks
from larp.engine.settings import EngineConfig
from larp.models.discriminator import Discriminator, DiscriminatorConfig
from larp.models.losses import (
    LeCam,
    discriminator_loss,
    generator_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    r1_penalty,
)
from larp.models.noise import BatchNoise
from larp.models.objective import LossConfig
from larp.models.tokenizer_config import TokenizerConfig

import torch
from torch import Tensor


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


def open_adversary(
    config: AdversaryConfig,
    weights: LossConfig,
    model: TokenizerConfig,
    lr_factor: Callable[[int], float],
    engine: EngineConfig,
    batch_size: int,
    ranks: Ranks,
) -> Adversary | None:
    """Build the discriminator for the clips of a tokenizer in its engine; None if its loss has no weight.

    lr_factor: factor on its learning rate at each of its own steps. engine, batch_size, ranks: as for the tokenizer.
    """
    if weights.gan == 0:
        return None
    discriminator = Discriminator(config.discriminator(model)).to(ranks.device)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=config.lr, betas=(0.5, 0.9))
    made = backend.make_engine(
        discriminator, optimizer, lr_factor, engine, batch_size, ranks, name="discriminator", max_zero_stage=2
    )
    return Adversary(made, weights)
