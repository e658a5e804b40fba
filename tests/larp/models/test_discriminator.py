"""Discriminator and adversarial losses against the reference's golden values."""

from larp.models.discriminator import Discriminator
from larp.models.losses import (
    LeCam,
    discriminator_loss,
    generator_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    smooth_targets,
)
from larp.models.noise import BatchNoise

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def golden(golden_root):
    folder = golden_root / "official_discriminator"
    return Discriminator.from_pretrained(folder), load_file(folder / "expected.safetensors")


@torch.no_grad()
def test_golden_logits_and_losses(golden):
    model, want = golden
    real, fake = model(want["real"]), model(want["fake"])
    torch.testing.assert_close(real, want["logits_real"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fake, want["logits_fake"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(discriminator_loss(real, fake), want["ns_d"][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(generator_loss(fake), want["ns_g"][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(hinge_discriminator_loss(real, fake), want["hinge_d"][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(hinge_generator_loss(fake), want["hinge_g"][0], rtol=1e-5, atol=0)
    lecam = LeCam()
    lecam.real, lecam.fake = want["lecam_ema_real"].item(), want["lecam_ema_fake"].item()
    torch.testing.assert_close(lecam(real, fake), want["lecam"][0], rtol=1e-5, atol=1e-7)


def test_range_of_the_smooth_targets():
    real, fake = smooth_targets(BatchNoise(0, 0, 1000))
    assert 0.7 <= real.min() < 0.75 and 0.99 < real.max() <= 1
    assert 0 <= fake.min() < 0.01 and 0.25 < fake.max() <= 0.3
