"""training/extract_tokens.py: its options reach the cache, and it says what it left out."""

from pathlib import Path

from larp.data.token_cache import TokenCache, TokenCacheError
from larp.data.video import write_video
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig
from training.extract_tokens import main

import numpy as np
import pytest
import torch


@pytest.fixture
def home(tmp_path) -> Path:
    """A folder with a tokenizer and its average, in `tok`, and a Kinetics-600 of three videos, of which two are there."""
    sides = {
        f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("width", 8), ("depth", 1), ("heads", 1))
    }
    shape = dict(num_frames=4, height=8, width=8, patch_size=(2, 8, 8), num_tokens=3, codebook_size=16, code_dim=4)
    config = TokenizerConfig(**shape, **sides, prior=PriorConfig(enabled=False))
    LarpTokenizer(config).save_pretrained(tmp_path / "tok", ema=LarpTokenizer(config))
    random = np.random.default_rng(0)
    for name in ("aaaaaaaaaaa_000001_000011", "bbbbbbbbbbb_000002_000012"):
        write_video(tmp_path / "k600" / f"{name}.mp4", random.integers(0, 255, (20, 8, 8, 3), dtype=np.uint8), fps=25)
    lines = [
        "abseiling,aaaaaaaaaaa,1,11,val",
        "surfing water,bbbbbbbbbbb,2,12,val",
        "surfing water,ccccccccccc,3,13,val",
    ]
    text = "\n".join(["label,youtube_id,time_start,time_end,split", *lines])
    (tmp_path / "k600" / "validate.csv").write_text(text)
    return tmp_path


def extract(home: Path, out: str, *options: str) -> TokenCache:
    where = ["--tokenizer", str(home / "tok"), "--data", f"k600:{home / 'k600'}", "--split", "validation"]
    return main([*where, "--out", str(home / out), *options])


def test_options_reach_the_cache(home, capsys):
    cache = extract(home, "cache", "--windows", "4", "--hop", "6", "--flips", "--condition-frames", "3")
    said = capsys.readouterr().out
    assert "1 of 3 listed validation videos are missing, such as ccccccccccc_000003_000013" in said
    assert "12 clips of 2 videos, 3 codes each" in said and "25 frames per second" in said
    assert cache.classes == ("abseiling", "surfing water") and cache.labels.bincount().tolist() == [6, 6]
    assert cache.starts[:6].tolist() == [0, 0, 6, 6, 12, 12] and cache.conditions.shape == cache.codes.shape


def test_a_variant_of_the_tokenizer_is_another_cache(home):
    average = extract(home, "cache", "--variant", "ema")
    assert average.variant == "ema"
    assert average.key["tokenizer"] == LarpTokenizer.from_pretrained(home / "tok", variant="ema").weight_hash()
    with pytest.raises(TokenCacheError, match="tokenizer is"):
        extract(home, "cache")
    assert not torch.equal(extract(home, "plain").codes, average.codes)


def test_mistakes_are_named(home):
    with pytest.raises(ValueError, match=r"hop is 3: windows reach over 4 frames"):
        extract(home, "cache", "--hop", "3")
    with pytest.raises(ValueError, match=r"has no train split; choose validation"):
        extract(home, "cache", "--split", "train")
    for option in ("windows", "batch_size"):
        with pytest.raises(ValueError, match=rf"{option} is 0; at least one"):
            extract(home, "cache", f"--{option.replace('_', '-')}", "0")
    with pytest.raises(ValueError, match=r"workers is -1; it must be 0"):
        extract(home, "cache", "--workers", "-1")
    assert not (home / "cache").exists()
    assert len(extract(home, "cache", "--workers", "0")) == 2


def test_machines_share_an_extraction(home, capsys):
    assert extract(home, "cache", "--share", "2/2") is None, "its share of one shard is none"
    assert "share 2/2 is done; the cache in" in capsys.readouterr().out
    with pytest.raises(TokenCacheError, match="is unfinished"):
        TokenCache.open(home / "cache")
    assert torch.equal(extract(home, "cache", "--share", "1/2").codes, extract(home, "whole").codes)
    assert "2 clips of 2 videos" in capsys.readouterr().out
    for share in ("0/2", "3/2", "2", "1/0", "a/b"):
        with pytest.raises(ValueError, match=f"share is '{share}'; it must be K/N with 1 <= K <= N"):
            extract(home, "other", "--share", share)
    assert not (home / "other").exists()
