"""Adversarial training of the tokenizer: a discriminator in a separate engine (arXiv 2410.21264, section 4.1).

Shapes: B batch, T frames, H, W pixels.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from larp.engine import backend
from larp.engine.backend import Engine, Ranks
from larp.engine.settings import EngineConfig
from larp.models import losses
from larp.models.discriminator import Discriminator, DiscriminatorConfig
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
        """Return the config of the discriminator for the clips of a tokenizer."""
        return DiscriminatorConfig(*model.clip_shape, model.patch_size, self.hidden, self.depth, self.heads)


class Adversary:
    """A discriminator in its own engine, and the adversarial losses of tokenizer and discriminator.

    Args:
        engine: of a `Discriminator`, at zero_stage 0 to 2, because the raw module of stage 3 gives wrong gradients.
        weights: weights, kinds and schedules of the losses.
    """

    def __init__(self, engine: Engine, weights: LossConfig):
        self.engine, self.weights = engine, weights
        self.lecam = losses.LeCam()

    @property
    def discriminator(self) -> Discriminator:
        """The raw module."""
        return self.engine.module

    def is_active(self, position: float) -> bool:
        """Whether the adversarial loss applies at this position on the schedule, in steps."""
        return position >= self.weights.gan_start

    def is_update_step(self, position: float, step: int) -> bool:
        """Whether the discriminator is updated at this position on the schedule and this step."""
        return self.is_active(position) and step % self.weights.gan_every == 0

    def generator_loss(self, reconstruction: Tensor) -> Tensor:
        """Return the adversarial loss of the tokenizer, a scalar, for reconstructions (B, 3, T, H, W).

        Its backward pass must run inside `frozen` as well.
        """
        with self.frozen(), self.engine.autocast():
            fake = self.discriminator(reconstruction)
        return losses.hinge_generator_loss(fake) if self.weights.gan_kind == "hinge" else losses.generator_loss(fake)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Disable gradients of the discriminator's parameters.

        The backward pass of `generator_loss` belongs inside, because checkpointed blocks run forward again there.
        """
        trainable = [p for p in self.discriminator.parameters() if p.requires_grad]
        for p in trainable:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in trainable:
                p.requires_grad_(True)

    def update(self, clip: Tensor, reconstruction: Tensor, noise: BatchNoise, data_step: int | None = None) -> Tensor:
        """Train the discriminator on one micro batch; return its total loss, a scalar.

        Args:
            clip, reconstruction: (B, 3, T, H, W); the reconstruction is detached.
            noise: random numbers of the micro batch.
            data_step: the step of the data.
        """
        # One forward pass for both, because an engine expects one per backward pass.
        real, fake = self.engine(torch.cat([clip, reconstruction])).chunk(2)
        loss = self.discriminator_loss(real, fake, noise) + self.weights.lecam * self.lecam(real, fake)
        if self.weights.r1 and self.engine.step_count % self.weights.r1_every == 0:
            # Added to the loss, because an engine expects one backward pass per micro batch.
            loss = loss + self.weights.r1 * self.weights.r1_every * losses.r1_penalty(self.discriminator, clip)
        self.engine.backward(loss)
        self.engine.step(data_step)
        means = backend.reduce_mean({"real": real.detach().mean(), "fake": fake.detach().mean()})
        if math.isfinite(means["real"]) and math.isfinite(means["fake"]):
            # Running means would keep what is not finite, and no later loss would be.
            self.lecam.update(means["real"], means["fake"])
        return loss

    def discriminator_loss(self, real: Tensor, fake: Tensor, noise: BatchNoise) -> Tensor:
        """Return the adversarial loss of the discriminator, a scalar, for logits (B, 1); without LeCam and R1."""
        if self.weights.gan_kind == "hinge":
            return losses.hinge_discriminator_loss(real, fake)
        return losses.discriminator_loss(real, fake, noise if self.weights.gan_kind == "smooth" else None)

    def state_dict(self) -> dict[str, float]:
        """Return the state that the engine's checkpoint does not hold."""
        return {"lecam_real": self.lecam.real, "lecam_fake": self.lecam.fake}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Load a `state_dict`."""
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
