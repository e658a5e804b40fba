"""The adversary: effect of each option; sharding and accumulation change nothing."""

from dataclasses import replace

from larp.engine import backend
from larp.engine.adversary import Adversary
from larp.engine.backend import EngineConfig
from larp.models.discriminator import Discriminator, DiscriminatorConfig
from larp.models.losses import discriminator_loss, hinge_generator_loss, r1_penalty
from larp.models.noise import BatchNoise
from larp.models.objective import LossConfig

import pytest
import torch

TINY = DiscriminatorConfig(num_frames=2, height=16, width=16, patch_size=(2, 8, 8), hidden=16, depth=2, heads=2)
WEIGHTS = LossConfig(lecam=0.0)


@pytest.fixture(scope="module")
def ranks():
    """The ranks of a single process."""
    yield backend.start(seed=0)
    backend.finish()


def discriminator() -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(TINY)


def adversary(ranks, weights: LossConfig = WEIGHTS, **engine) -> Adversary:
    module = discriminator()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    config = EngineConfig(clip_grad=0.0, **engine)
    made = backend.make_engine(module, optimizer, lambda step: 1.0, config, 4, ranks, name="discriminator")
    return Adversary(made, weights)


def clips(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.rand(4, 3, 2, 16, 16, generator=generator), torch.rand(4, 3, 2, 16, 16, generator=generator)


def train(adversarial: Adversary, updates: int) -> list[float]:
    losses = []
    for step in range(updates):
        parts = adversarial.engine.config.accumulation
        pairs = zip(*(side.chunk(parts) for side in clips(step)), strict=True)
        rows = 4 // parts
        noise = (BatchNoise(0, step, 4, i * rows, rows) for i in range(parts))
        losses.append(sum(adversarial.update(*pair, n).item() / parts for pair, n in zip(pairs, noise, strict=True)))
    return losses


def plain(updates: int, r1: float, every: int) -> list[float]:
    """The same training in plain torch."""
    module, losses = discriminator(), []
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(updates):
        real, fake = clips(step)
        loss = discriminator_loss(*module(torch.cat([real, fake])).chunk(2), BatchNoise(0, step, 4))
        if step % every == 0:
            pixels = real.requires_grad_()
            # The mathematics kernel of attention: torch's own has no second derivative.
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                gradients = [torch.autograd.grad(module(p[None]), p, create_graph=True)[0] for p in pixels]
            loss = loss + r1 * every * sum(g.square().sum() for g in gradients) / len(gradients)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_r1_is_the_squared_gradient_and_its_own_gradient_is_exact():
    class Quadratic(torch.nn.Module):
        """logit = sum of w x^2, whose gradient by x is 2 w x."""

        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.rand(3, 2, 4, 4))

        def forward(self, clip):
            return (self.w * clip.square()).flatten(1).sum(dim=1, keepdim=True)

    model, clip = Quadratic(), torch.rand(5, 3, 2, 4, 4, requires_grad=True)
    penalty = r1_penalty(model, clip)
    torch.testing.assert_close(penalty, (2 * model.w * clip).square().flatten(1).sum(dim=1).mean())
    penalty.backward()
    torch.testing.assert_close(model.w.grad, (8 * model.w * clip.square()).mean(dim=0))
    assert clip.grad is None, "it reaches the discriminator only"


def test_r1_gradient_agrees_with_differences_and_checkpointed_blocks_give_the_same():
    model, clip = discriminator(), clips(0)[0]
    r1_penalty(model, clip).backward()
    weight = model.encoder.blocks[0].attn.qkv.weight
    direction = weight.grad / weight.grad.norm()
    sides = []
    for moved in (1e-3, -2e-3):
        with torch.no_grad():
            weight.add_(direction, alpha=moved)
        sides.append(r1_penalty(model, clip).item())
    with torch.no_grad():
        weight.add_(direction, alpha=1e-3)
    assert (sides[0] - sides[1]) / 2e-3 == pytest.approx(weight.grad.norm().item(), rel=1e-2)
    again = discriminator()
    for block in again.encoder.blocks:
        block.checkpointing = True
    r1_penalty(again, clip).backward()
    torch.testing.assert_close(again.encoder.blocks[0].attn.qkv.weight.grad, weight.grad)
    assert all(block.checkpointing for block in again.encoder.blocks), "checkpointing is on again afterwards"


def test_r1_is_exact_in_half_precision():
    model, clip = discriminator(), clips(0)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = r1_penalty(model, clip)
    torch.testing.assert_close(half, r1_penalty(model, clip))


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_lazy_r1_trains_like_plain_torch(ranks, stage, accumulation):
    adversarial = adversary(ranks, replace(WEIGHTS, r1=0.01, r1_every=2), zero_stage=stage, accumulation=accumulation)
    losses = train(adversarial, 5)
    assert losses == pytest.approx(plain(5, 0.01, 2), rel=1e-4)
    without = train(adversary(ranks, zero_stage=stage, accumulation=accumulation), 5)
    assert losses[0] > without[0] and losses[1] != pytest.approx(without[1], rel=1e-4), (
        "the weights have moved elsewhere"
    )


def test_a_clip_that_is_not_finite_costs_the_discriminator_one_update(ranks, capsys):
    adversarial = adversary(ranks, replace(WEIGHTS, lecam=0.1))
    adversarial.engine.clips_of = lambda step: [f"clip of step {step}"]
    real, fake = clips(0)
    before = {name: p.clone() for name, p in adversarial.discriminator.state_dict().items()}
    adversarial.update(real, fake * float("nan"), BatchNoise(0, 0, 4), 7)
    assert all(torch.equal(p, before[name]) for name, p in adversarial.discriminator.state_dict().items())
    assert adversarial.engine.skipped_count == 1 and adversarial.state_dict() == {"lecam_real": 0.0, "lecam_fake": 0.0}
    assert "step 8: loss or gradient of the discriminator is not finite" in (said := capsys.readouterr().out)
    assert "clip of step 7" in said
    assert adversarial.update(real, fake, BatchNoise(0, 1, 4)).isfinite() and adversarial.engine.skipped_count == 1


def test_kinds_of_adversarial_loss(ranks):
    first = {}
    for kind in ("smooth", "plain", "hinge"):
        adversarial = adversary(ranks, replace(WEIGHTS, gan_kind=kind))
        with torch.no_grad():
            real, fake = (adversarial.discriminator(side) for side in clips(0))
        first[kind] = train(adversarial, 1)[0]
        reconstruction = clips(1)[1].requires_grad_()
        adversarial.generator_loss(reconstruction).backward()
        assert reconstruction.grad.abs().sum() > 0
        assert all(p.grad is None or not p.grad.any() for p in adversarial.discriminator.parameters())
    assert first["plain"] == pytest.approx(discriminator_loss(real, fake).item(), rel=1e-5)
    assert first["hinge"] == pytest.approx(((1 - real).relu() + (1 + fake).relu()).mean().item() / 2, rel=1e-5)
    assert len(set(first.values())) == 3
    with torch.no_grad():
        hinge = adversary(ranks, replace(WEIGHTS, gan_kind="hinge"))
        torch.testing.assert_close(
            hinge.generator_loss(clips(0)[1]), hinge_generator_loss(hinge.discriminator(clips(0)[1]))
        )


@pytest.mark.parametrize(
    "options, words",
    [
        ({"gan_every": 0}, r"loss\.gan_every"),
        ({"r1_every": 0}, r"loss\.r1_every"),
        ({"r1": -1.0}, r"loss\.r1 = -1"),
        ({"lecam": -1.0}, r"loss\.lecam"),
        ({"r1": 1.0, "gan": 0.0}, r"loss\.gan = 0"),
    ],
)
def test_bad_weights_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        LossConfig(**options)
