"""eval/bench/reference.py: codes, clips, losses and gradients of the reference implementation are ours."""

from bench.reference import ReferenceTokenizer, reference_discriminator
from larp.engine.adversary import AdversaryConfig
from larp.models.discriminator import Discriminator
from larp.models.noise import BatchNoise
from larp.models.objective import LossConfig, tokenizer_loss
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig

import torch

CONFIG = TokenizerConfig(
    num_frames=4, height=16, width=24, patch_size=(2, 8, 8), decoder_patch_size=(2, 4, 8), num_tokens=6, codebook_size=32,
    code_dim=8, encoder_width=32, encoder_depth=2, encoder_heads=4, decoder_width=16, decoder_depth=3, decoder_heads=2,
    prior=PriorConfig(depth=2, heads=2, width=24, positions=6, dropout=0.0),
)  # fmt: skip
ADVERSARY = AdversaryConfig(hidden=16, depth=2, heads=2).discriminator(CONFIG)


def build() -> LarpTokenizer:
    model = LarpTokenizer(CONFIG)
    torch.nn.init.normal_(model.head.weight, std=0.05)
    return model


def test_the_reference_returns_what_ours_returns():
    model, clip = build(), torch.rand(2, 3, *CONFIG.clip_shape)
    reference = ReferenceTokenizer(model)
    assert torch.equal(model.encode(clip), reference.encode(clip))
    torch.testing.assert_close(model.decode(model.encode(clip)), reference.decode(reference.encode(clip)))
    slopes = []
    for way in (model, reference):
        out = way(clip, BatchNoise(0, 0, 2), 0.5)
        loss, _ = tokenizer_loss(LossConfig(), clip, out)
        slopes.append([loss, out.reconstruction, *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    discriminator = Discriminator(ADVERSARY)
    torch.testing.assert_close(discriminator(clip), reference_discriminator(discriminator, clip))
