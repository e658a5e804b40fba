"""training/train_tokenizer.py on a tiny tokenizer and the built-in videos, and every shipped recipe."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from larp.config import ConfigError, from_dict, load_recipe
from larp.data.datasets import DataError
from larp.engine.ranks import free_port
from larp.tokenizer import LarpTokenizer
from training.train_tokenizer import RECIPES, TrainTokenizerConfig, main

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TINY = """
data = "shapes:count=24,size=16"
steps = 6
batch_size = 4
continuous = 0.34
reset_codes_every = 2
in_memory = true
log_every = 1
eval_every = 6
eval_clips = 8
save_every = 3
[model]
num_frames = 16
height = 16
width = 16
patch_size = [8, 8, 8]
num_tokens = 4
codebook_size = 16
code_dim = 4
encoder_width = 16
encoder_depth = 1
encoder_heads = 2
decoder_width = 16
decoder_depth = 1
decoder_heads = 2
init = "balanced"
[model.prior]
depth = 1
heads = 2
width = 16
positions = 4
dropout = 0.0
[loss]
gan_start = 3
gan_every = 2
lpips = 0.0
[adversary]
hidden = 16
depth = 1
heads = 2
[optimizer]
name = "muon"
lr = 1e-3
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(TINY)
    return path


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out) if "loss" in line]


def test_a_run_leaves_a_model_a_report_and_pictures(recipe, tmp_path):
    out = tmp_path / "run"
    report = main(["--recipe", str(recipe), "--out", str(out)])
    model = LarpTokenizer.from_pretrained(out / "model")
    assert model.config.num_tokens == 4
    assert json.loads((out / "report.json").read_text())["psnr"] == report["psnr"]
    assert {"psnr", "ssim", "mean_colour_psnr", "prior_top1", "codes_used", "seconds", "skipped_videos"} <= set(report)
    assert (out / "samples/reconstruction-000006.mp4").is_file() and (
        out / "samples/reconstruction-000006.png"
    ).is_file()
    steps = lines(out)
    assert "quantizer" not in steps[0] and "prior" not in steps[0], "the start is continuous"
    assert {"quantizer", "prior", "prior_top1"} <= set(steps[3]) and "gan" in steps[3] and "discriminator" in steps[4]


def test_resume_equals_the_uninterrupted_run(recipe, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(["--recipe", str(recipe), "--out", str(whole)])
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "state/step-00000006")
    shutil.rmtree(cut / "model")
    main(["--recipe", str(recipe), "--out", str(cut), "--resume"])
    assert losses(cut) == losses(whole)
    for left, right in zip(
        *(LarpTokenizer.from_pretrained(out / "model").state_dict().values() for out in (whole, cut)), strict=True
    ):
        assert torch.equal(left, right)


def test_resuming_a_finished_run_loses_nothing(recipe, tmp_path):
    options = ["--recipe", str(recipe), "--out", str(tmp_path / "run")]
    before = main(options)
    shutil.rmtree(tmp_path / "run/model")
    after = main([*options, "--resume"])
    assert {name: after[name] for name in ("psnr", "prior_top1")} == {
        name: before[name] for name in ("psnr", "prior_top1")
    }
    assert (tmp_path / "run/model/model.safetensors").is_file()


def test_resuming_says_what_changed_and_refuses_another_discriminator(recipe, tmp_path, capsys):
    options = ["--recipe", str(recipe), "--out", str(tmp_path / "run")]
    main([*options, "--steps", "3"])
    main([*options, "--steps", "4", "--resume"])
    assert "steps was 3, is 4" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"adversary\.hidden was 16, is 32"):
        main([*options, "--steps", "6", "--resume", "--adversary.hidden", "32"])
    main([*options[:-1], str(tmp_path / "new"), "--steps", "2", "--resume"])
    assert "no whole checkpoint: starting at step 0" in capsys.readouterr().out


def test_the_prior_is_one_option_away_from_off(recipe, tmp_path):
    out = tmp_path / "run"
    report = main(["--recipe", str(recipe), "--out", str(out), "--model.prior.no-enabled", "--steps", "3"])
    assert "prior_top1" not in report and LarpTokenizer.from_pretrained(out / "model").prior is None


def test_nested_tokens_train_and_decode_from_any_prefix(recipe, tmp_path):
    options = ["--recipe", str(recipe), "--steps", "4", "--model.nested", "--prefix-share", "1"]
    main([*options, "--out", str(tmp_path / "run")])
    model = LarpTokenizer.from_pretrained(tmp_path / "run/model")
    assert model.config.nested and model.decode(torch.zeros(1, 2, dtype=torch.long)).shape == (1, 3, 16, 16, 16)
    main(["--recipe", str(recipe), "--steps", "4", "--out", str(tmp_path / "fixed")])
    assert losses(tmp_path / "run") != losses(tmp_path / "fixed")


def test_the_temperature_falls_as_scheduled_and_usage_is_logged(recipe, tmp_path):
    options = ["--recipe", str(recipe), "--temperature-start", "0.3", "--temperature-ramp", "0.5", "--out"]
    main([*options, str(tmp_path / "run")])
    steps = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert [line["temperature"] for line in steps] == pytest.approx([0.3, 0.3, 0.3, 0.3 * 0.1**0.5, 0.03, 0.03])
    assert all(1 <= line["perplexity"] <= 16 and 0 < line["codes_used"] <= 1 for line in steps[2:])
    assert "perplexity" not in steps[0], "the start is continuous"


def test_accumulation_gives_the_losses_of_one_batch(recipe, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # Without the discriminator: its LeCam means move once for each micro batch.
    options = ["--recipe", str(recipe), "--loss.gan", "0"]
    main([*options, "--out", str(whole)])
    main([*options, "--out", str(parts), "--engine.accumulation", "2"])
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("gan", ["0", "0.3"])
def test_two_processes_train_to_the_losses_of_one(recipe, tmp_path, gan):
    command = [Path(sys.executable).parent / "deepspeed", "--master_port", str(free_port())]
    script = [ROOT / "training/train_tokenizer.py", "--recipe", recipe, "--loss.gan", gan, "--steps", "30"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for processes in ("1", "2"):
        out = tmp_path / processes
        words = [str(w) for w in (*command, "--num_accelerators", processes, *script, "--out", out)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)


@pytest.mark.parametrize("name", ["larp-l-long", *sorted(path.stem for path in RECIPES.glob("tokenizer-*.toml"))])
def test_shipped_recipes_build(name):
    config = from_dict(TrainTokenizerConfig, load_recipe(name, RECIPES), where=name)
    with torch.device("meta"):
        LarpTokenizer(config.model)


def test_real_clips_train(recipe, tmp_path, clips_root):
    options = ["--recipe", str(recipe), "--data", f"folder:{clips_root / 'odd'}"]
    report = main([*options, "--out", str(tmp_path / "run"), "--eval-data", "shapes:count=24,size=16"])
    assert report["skipped_videos"] > 0, "the corrupt file is skipped and counted"
    with pytest.raises(ValueError, match="--eval-data"):
        main([*options, "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists(), "a mistake leaves no run behind"


@pytest.mark.parametrize(
    "options, error, words",
    [
        (["--data", "ucf99:/x"], DataError, "ucf101"),
        (["--batch-size", "5", "--engine.accumulation", "2"], ValueError, "batch_size 5"),
        (
            ["--engine.zero-stage", "3", "--reset-codes-every", "0", "--optimizer.name", "adam"],
            ValueError,
            "zero_stage",
        ),
        (["--engine.zero-stage", "1", "--reset-codes-every", "0"], ValueError, "muon"),
        (["--prefix-share", "0"], SystemExit, "2"),
        (["--temperature-start", "0.1", "--model.no-stochastic"], SystemExit, "2"),
        (["--recipe", "tokenizer-shape32"], ConfigError, "tokenizer-shapes32"),
    ],
)
def test_bad_options_name_the_option_and_the_remedy(recipe, tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        main(["--recipe", str(recipe), "--out", str(tmp_path / "run"), *options])


def test_a_run_is_not_overwritten(recipe, tmp_path):
    out = tmp_path / "run"
    main(["--recipe", str(recipe), "--out", str(out), "--steps", "3"])
    before = (out / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="--resume"):
        main(["--recipe", str(recipe), "--out", str(out), "--steps", "3"])
    with pytest.raises(ValueError, match="num_tokens"):
        main(["--recipe", str(recipe), "--out", str(out), "--steps", "9", "--resume", "--model.num-tokens", "3"])
    assert (out / "metrics.jsonl").read_text() == before
