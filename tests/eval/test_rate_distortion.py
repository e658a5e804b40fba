"""eval/rate_distortion.py, from the command line to the files, with tiny random tokenizers."""

import json
from pathlib import Path

from eval import rate_distortion as curve
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig

import pytest
import torch
from PIL import Image

_SIZES = dict(encoder_width=32, encoder_depth=1, encoder_heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2)


def tokenizer(folder: Path, **changes) -> str:
    settings = dict(num_frames=8, height=16, width=16, num_tokens=6, codebook_size=32, code_dim=4, **_SIZES)
    model = LarpTokenizer(TokenizerConfig(**settings | {"prior": PriorConfig(enabled=False)} | changes))
    torch.nn.init.normal_(model.head.weight, std=0.05)
    return str(model.save_pretrained(folder))


def test_every_length_is_measured_plotted_and_shown(tmp_path):
    nested, fixed = tokenizer(tmp_path / "nested", nested=True), tokenizer(tmp_path / "fixed", num_tokens=3)
    out = tmp_path / "curve.json"
    options = ["--tokenizer", nested, "--data", "shapes:count=8,size=16", "--split", "all", "--out", str(out)]
    report = curve.main([*options, "--compare", fixed, "--targets", "1", "200", "--show", "2"])
    assert json.loads(out.read_text()) == report
    assert [p["num_tokens"] for p in report["curve"]] == [1, 2, 4, 6] and report["num_clips"] == 24
    assert report["curve"][-1]["bits_per_clip"] == 30
    assert report["curve"][-1]["bits_per_pixel"] == pytest.approx(30 / (8 * 16 * 16))
    easy, impossible = report["targets"]
    assert easy["num_tokens"] == 1 and easy["reached"] == 1
    assert impossible["num_tokens"] == 6 and impossible["reached"] == 0
    assert impossible["psnr"] == pytest.approx(report["curve"][-1]["psnr"])
    assert report["compare"][0]["num_tokens"] == 3 and report["compare"][0]["psnr"] > 0
    for name in ("curve-curve.png", "curve-clips.png"):
        assert min(Image.open(tmp_path / name).size) > 50


def test_the_averaged_weights_can_be_measured(tmp_path):
    folder = Path(tokenizer(tmp_path / "nested", nested=True))
    averaged = LarpTokenizer.from_pretrained(folder)
    torch.nn.init.zeros_(averaged.head.weight)
    LarpTokenizer.from_pretrained(folder).save_pretrained(folder, ema=averaged)
    options = ["--tokenizer", str(folder), "--data", "shapes:count=8,size=16", "--out", str(tmp_path / "x.json")]
    last, ema = (curve.main([*options, *more])["curve"] for more in ([], ["--variant", "ema"]))
    assert len({p["psnr"] for p in last}) > 1 and len({p["psnr"] for p in ema}) == 1, (
        "a head of zeros paints one colour"
    )


def test_mistakes_are_named(tmp_path):
    data = ["--data", "shapes:count=8,size=16", "--out", str(tmp_path / "x.json")]
    with pytest.raises(ValueError, match="nested"):
        curve.main(["--tokenizer", tokenizer(tmp_path / "fixed"), *data])
    nested = tokenizer(tmp_path / "nested", nested=True)
    with pytest.raises(ValueError, match="7 codes"):
        curve.main(["--tokenizer", nested, *data, "--lengths", "2", "7"])
    with pytest.raises(ValueError, match=r"\(8, 32, 16\)"):
        curve.main(["--tokenizer", nested, *data, "--compare", tokenizer(tmp_path / "high", height=32)])
    with pytest.raises(ValueError, match="--data"):
        curve.main(["--tokenizer", nested])
