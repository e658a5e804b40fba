"""The convolutions after the decoder: a new one changes nothing, frames see their neighbours alone, and all of a tokenizer works with it."""

from dataclasses import replace

from larp.models.growing import grown, with_refiner
from larp.models.refiner import Refiner
from larp.models.tokenizer import LarpTokenizer
from tests.larp_mllm.tiny import tiny_video_tokenizer

import pytest
import torch


def changed(refiner: Refiner) -> Refiner:
    """Let a new refiner change something."""
    torch.nn.init.normal_(refiner.last.weight, std=0.1)
    return refiner


@pytest.fixture
def refined():
    tokenizer = with_refiner(tiny_video_tokenizer(), 8).eval()
    # A new head draws the same for all codes.
    torch.nn.init.normal_(tokenizer.head.weight, std=0.1)
    changed(tokenizer.refiner)
    return tokenizer


def test_a_new_refiner_changes_nothing():
    clip = torch.rand(2, 3, 4, 6, 10)
    assert torch.equal(Refiner(8)(clip), clip)


@torch.no_grad()
def test_a_frame_is_refined_from_itself_and_its_neighbours():
    refiner, clip = changed(Refiner(8)), torch.rand(2, 3, 5, 8, 8)
    other = clip.clone()
    other[1, :, 3] = torch.rand(3, 8, 8)
    differing = (refiner(clip) != refiner(other)).flatten(3).any(3).any(1)
    assert differing.tolist() == [[False] * 5, [False, False, True, True, True]]
    alone = refiner(clip[:, :, :1])
    assert alone.shape == (2, 3, 1, 8, 8)


@torch.no_grad()
def test_the_codes_stay_and_the_clip_changes(refined):
    plain = LarpTokenizer(replace(refined.config, refiner_width=0)).eval()
    plain.load_state_dict(
        {name: value for name, value in refined.state_dict().items() if not name.startswith("refiner.")}
    )
    clip = torch.rand(3, 3, 4, 16, 16)
    codes = plain.encode(clip)
    assert torch.equal(refined.encode(clip), codes)
    assert not torch.equal(refined.decode(codes), plain.decode(codes))
    assert refined.decode(codes, 2).shape == (3, 3, 2, 16, 16)
    torch.testing.assert_close(
        refined.decode_latents(plain.quantizer.lookup(codes)),
        refined.refiner(plain.decode_latents(plain.quantizer.lookup(codes))),
    )
    assert refined.weight_hash() != plain.weight_hash()


@torch.no_grad()
def test_it_is_stored_and_loaded(refined, tmp_path):
    codes = torch.randint(16, (2, 4))
    again = LarpTokenizer.from_pretrained(refined.save_pretrained(tmp_path / "model"))
    assert torch.equal(again.decode(codes), refined.decode(codes))
    refined.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    half = LarpTokenizer.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert (half.decode(codes) - refined.decode(codes)).abs().max() < 0.1


def test_a_trained_tokenizer_gets_one():
    plain = tiny_video_tokenizer()
    wanted = replace(plain.config, refiner_width=8, num_tokens=8)
    new = grown(plain, wanted)
    assert (new.num_tokens, new.refiner.first.out_channels) == (8, 8)
    assert grown(new, wanted) is new and grown(plain, plain.config) is plain


def test_odd_sides_are_refused():
    config = tiny_video_tokenizer().config
    with pytest.raises(ValueError, match="a refiner needs even sides, got 15x16"):
        replace(config, height=15, patch_size=(2, 5, 8), refiner_width=8)
    with pytest.raises(ValueError, match="refiner_width = -1 must be 0 or more"):
        replace(config, refiner_width=-1)
