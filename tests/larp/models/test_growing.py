"""A tokenizer that starts with more codes than the trained one has."""

from dataclasses import replace

from larp.models.growing import with_more_codes
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig

import pytest
import torch

_SIDES = dict(encoder_width=32, encoder_depth=1, encoder_heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2)
CONFIG = TokenizerConfig(num_frames=4, height=16, width=16, num_tokens=4, codebook_size=32, code_dim=4, init="balanced", **_SIDES,
                         prior=PriorConfig(depth=1, heads=2, width=16, positions=4))  # fmt: skip
CLIP = torch.rand(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def trained() -> LarpTokenizer:
    torch.manual_seed(0)
    tokenizer = LarpTokenizer(CONFIG).eval()
    torch.nn.init.normal_(tokenizer.head.weight, std=0.1)
    return tokenizer


def test_it_has_more_codes_and_everything_else_of_the_trained_one(trained):
    grown = with_more_codes(trained, 12).eval()
    assert grown.config == replace(CONFIG, num_tokens=12, prior=replace(CONFIG.prior, enabled=False))
    assert grown.encode(CLIP).shape == (2, 12)
    changed = {name for name, value in grown.state_dict().items() if not torch.equal(value, trained.state_dict()[name])}
    assert changed == {"queries", "latent_positions"}
    # The first of each group of three stands where the trained query stood.
    torch.testing.assert_close(grown.latent_positions[:, ::3], trained.latent_positions)
    assert len(grown.latent_positions[0].unique(dim=0)) == 12 and len(grown.queries.unique(dim=0)) == 12


def test_it_draws_nearly_what_the_trained_one_draws(trained):
    before, after = (t.decode_latents(torch.nn.functional.normalize(t.project(CLIP), dim=-1))
                     for t in (trained, with_more_codes(trained, 8)))  # fmt: skip
    torch.manual_seed(1)
    unrelated = LarpTokenizer(with_more_codes(trained, 8).config).eval()
    torch.nn.init.normal_(unrelated.head.weight, std=0.1)
    other = unrelated.decode_latents(torch.nn.functional.normalize(unrelated.project(CLIP), dim=-1))
    assert (after - before).square().mean() < 0.2 * (other - before).square().mean()


def test_the_same_number_is_the_same_tokenizer_and_other_numbers_are_refused(trained):
    assert with_more_codes(trained, 4) is trained
    for number in (2, 6):
        with pytest.raises(ValueError, match=f"of 4 codes cannot become one of {number}: choose a multiple of 4"):
            with_more_codes(trained, number)
