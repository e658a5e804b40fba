"""The weights in the package: size, what they reconstruct, generate and describe, and what is said where they are the default."""

from pathlib import Path

import larp_mllm
from larp.data.clips import frames_to_clip
from larp.data.video import read_video
from larp.models.generator import LarpGenerator
from larp.models.losses import psnr
from larp.models.tokenizer import LarpTokenizer
from larp_mllm.locate import _say_once

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


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A machine on which nothing was trained."""
    monkeypatch.setenv("LARP_MLLM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LARP_MLLM_MODEL", raising=False)
    _say_once.cache_clear()


def test_the_language_model_is_the_default_and_says_what_it_is(fresh, capfd, tmp_path, monkeypatch):
    video = larp_mllm.generate("a person surfing")
    said = capfd.readouterr().err
    assert said.count("comes with larp-mllm") == 1 and "surfing" in said and "no word" not in said
    assert video.frames.shape == (16, 64, 64, 3) and len(video.codes) == 256 and video.fps == 25.0
    video.save(tmp_path / "surfing.mp4")
    assert larp_mllm.generate("a person surfing", model="tiny").codes == video.codes
    monkeypatch.chdir(SHIPPED)
    assert larp_mllm.generate("a person surfing", model="language-model").codes == video.codes
    assert "comes with" not in capfd.readouterr().err


def test_it_knows_what_it_was_trained_on(fresh, clips_root, capfd):
    """Clips of the test list: the nearest things to what its users will give it."""
    found = {
        name: larp_mllm.describe(clips_root / "ucf101/UCF-101" / f"{name}.mp4")
        for name in (
            "Surfing/v_Surfing_g01_c01",
            "BasketballDunk/v_BasketballDunk_g02_c02",
            "HorseRace/v_HorseRace_g01_c01",
        )
    }
    right = [name for name, text in found.items() if any(part in text for part in ("surf", "basketball", "horse")
             if part in name.lower())]  # fmt: skip
    assert len(right) >= 2, found


def test_a_prompt_far_from_the_captions_is_said(fresh, capfd):
    assert larp_mllm.generate("a spaceship landing").frames.shape == (16, 64, 64, 3)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "spaceship" in line]
    assert line.startswith('"a spaceship landing" has no word of the captions') and "surfing" in line


def test_the_generator_writes_codes_of_the_tokenizer(tokenizer):
    generator = LarpGenerator.from_pretrained(SHIPPED / "generator")
    generator.check_tokenizer(tokenizer.num_tokens, tokenizer.codebook_size, tokenizer.weight_hash())
    assert "Surfing" in generator.config.class_names and len(generator.config.class_names) == 6
    assert torch.allclose(generator.output.codebook, tokenizer.codebook, atol=0.01)


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
