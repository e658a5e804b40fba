"""The weights in the package: size, description, reconstruction of real clips."""

from pathlib import Path

import larp_mllm
from larp.data.clips import frames_to_clip
from larp.data.video import read_video
from larp.models.losses import psnr
from larp.models.tokenizer import LarpTokenizer

import pytest
import torch

SHIPPED = Path(larp_mllm.__file__).parent / "shipped"


@pytest.fixture(scope="module")
def tokenizer() -> LarpTokenizer:
    return LarpTokenizer.from_pretrained(SHIPPED / "tokenizer")


def test_the_shipped_files_are_small(tokenizer):
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40e6
    assert not [path.name for path in files if path.suffix not in (".md", ".json", ".safetensors")]
    assert tokenizer.config.clip_shape == (16, 64, 64) and tokenizer.num_tokens == 256


def test_real_clips_are_reconstructed(tokenizer, clips_root):
    """Clips of the test list, not trained on: above 20 dB each, where the mean colour is below."""
    names = ("Surfing/v_Surfing_g01_c01", "Archery/v_Archery_g02_c02", "PlayingPiano/v_PlayingPiano_g03_c01")
    for name in names:
        frames, _ = read_video(clips_root / "ucf101/UCF-101" / f"{name}.mp4", 20, 16)
        clip = frames_to_clip(frames, 64, 64)[None]
        codes = tokenizer.encode(clip)
        reconstruction = tokenizer.decode(codes)
        mean_colour = clip.mean(dim=(2, 3, 4), keepdim=True).expand_as(clip)
        assert psnr(clip, reconstruction) > 20 > psnr(clip, mean_colour), name
        assert torch.equal(codes, tokenizer.encode(clip)) and codes.unique().numel() > 64
