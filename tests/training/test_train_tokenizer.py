"""training/train_tokenizer.py on a tiny tokenizer and the built-in videos, and every shipped recipe."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from larp.config import ConfigError, from_dict, load_recipe
from larp.data.datasets import DataError, open_videos
from larp.engine.checkpoint import newest_state
from larp.engine.distributed import free_port
from larp.metrics.lpips import Lpips
from larp.metrics.weights import I3D_STYLEGANV, LPIPS_HEADS, VGG16, WeightFile, file_sha256
from larp.models.tokenizer import LarpTokenizer
from training import train_tokenizer
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


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    """The run of the recipe, six steps and a checkpoint after the third; tests take copies of it, or read only."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LARP_DATA", str(out.parent / "data"))
        main(["--recipe", str(recipe), "--out", str(out)])
    return out


@pytest.fixture
def cut(finished, tmp_path) -> Path:
    """The same run, stopped after the third step."""
    shutil.copytree(finished, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/state/step-00000006")
    shutil.rmtree(tmp_path / "cut/model")
    return tmp_path / "cut"


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out) if "loss" in line]


def test_a_run_leaves_a_model_a_report_and_pictures(finished):
    out, report = finished, json.loads((finished / "report.json").read_text())
    model = LarpTokenizer.from_pretrained(out / "model")
    assert model.config.num_tokens == 4
    assert {"psnr", "ssim", "mean_colour_psnr", "prior_top1", "codes_used", "seconds", "skipped_videos"} <= set(report)
    assert "ema_psnr" not in report and not (out / "model/model.ema.safetensors").exists()
    assert (out / "samples/reconstruction-000006.mp4").is_file() and (
        out / "samples/reconstruction-000006.png"
    ).is_file()
    steps = lines(out)
    assert "quantizer" not in steps[0] and "prior" not in steps[0], "the start is continuous"
    assert {"quantizer", "prior", "prior_top1"} <= set(steps[3]) and "gan" in steps[3] and "discriminator" in steps[4]


def test_resume_equals_the_uninterrupted_run(recipe, finished, cut):
    report = main(["--recipe", str(recipe), "--out", str(cut), "--resume"])
    assert report == json.loads((cut / "report.json").read_text())
    assert len(losses(cut)) == 6 and losses(cut) == losses(finished)
    for left, right in zip(
        *(LarpTokenizer.from_pretrained(out / "model").state_dict().values() for out in (finished, cut)), strict=True
    ):
        assert torch.equal(left, right)


def poisoned(monkeypatch, *steps: int) -> None:
    """Let the loss of these steps be NaN."""
    own, count = train_tokenizer.tokenizer_loss, iter(range(1000))

    def loss(*arguments):
        total, parts = own(*arguments)
        return (total * float("nan") if next(count) in steps else total), parts

    monkeypatch.setattr(train_tokenizer, "tokenizer_loss", loss)


def test_a_step_whose_loss_is_not_finite_is_skipped_counted_and_its_clips_are_named(
    recipe, tmp_path, monkeypatch, capsys
):
    poisoned(monkeypatch, 4)
    report = main(["--recipe", str(recipe), "--out", str(tmp_path / "run"), "--ema", "0.5"])
    assert report["skipped_updates"] == 1 and report["skipped_discriminator_updates"] == 0
    said = re.search(
        r"step 5: loss or gradient of the tokenizer is not finite, no update; its clips: (.*)", capsys.readouterr().out
    )
    assert len(said[1].split(", ")) == 4 and said[1].endswith(".mp4")
    steps = lines(tmp_path / "run")
    assert [line.get("skipped_updates") for line in steps[:6]] == [None, None, None, None, 1, 1]
    assert steps[4]["loss"] is None and steps[5]["loss"] > 0
    for variant in (None, "ema"):
        tensors = LarpTokenizer.from_pretrained(tmp_path / "run/model", variant=variant).state_dict()
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_run_without_a_finite_loss_ends_with_the_checkpoint_before_it(recipe, tmp_path, monkeypatch):
    options = [
        "--recipe",
        str(recipe),
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "30",
        "--eval-every",
        "30",
        "--save-every",
        "2",
    ]
    with monkeypatch.context() as patch:
        poisoned(patch, *range(5, 100))
        with pytest.raises(
            FloatingPointError, match=r"tokenizer was not finite in 10 steps in a row, .*step 15.*--resume"
        ):
            main(options)
    assert newest_state(tmp_path / "run").step == 4
    assert main([*options, "--resume"])["skipped_updates"] == 0


def test_resuming_a_finished_run_loses_nothing(recipe, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/model")
    after = main(["--recipe", str(recipe), "--out", str(tmp_path / "run"), "--resume"])
    before = json.loads((finished / "report.json").read_text())
    assert {name: after[name] for name in ("psnr", "prior_top1")} == {
        name: before[name] for name in ("psnr", "prior_top1")
    }
    assert (tmp_path / "run/model/model.safetensors").is_file()
    assert lines(tmp_path / "run") == lines(finished), "each step and each validation has one line"


def test_resuming_says_what_changed_and_refuses_another_discriminator(recipe, cut, tmp_path, capsys):
    options = ["--recipe", str(recipe), "--out", str(cut)]
    main([*options, "--steps", "4", "--resume"])
    assert "steps was 6, is 4" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"adversary\.hidden was 16, is 32"):
        main([*options, "--steps", "6", "--resume", "--adversary.hidden", "32"])
    for changed, words in (
        (["--optimizer.name", "adamw"], r"optimizer\.name was muon, is adamw"),
        (["--continuous", "0", "--reset-codes-every", "0"], "resets_codes was True, is False"),
        (["--steps", "3"], "at step 4, beyond the 3 steps"),
    ):
        with pytest.raises(ValueError, match=words):
            main([*options, "--steps", "6", "--resume", *changed])
    main([*options[:-1], str(tmp_path / "new"), "--steps", "2", "--resume"])
    assert "no whole checkpoint: starting at step 0" in capsys.readouterr().out


def test_the_prior_is_one_option_away_from_off(recipe, tmp_path):
    out = tmp_path / "run"
    report = main(["--recipe", str(recipe), "--out", str(out), "--model.prior.no-enabled", "--steps", "3"])
    without = LarpTokenizer.from_pretrained(out / "model")
    assert "prior_top1" not in report and without.prior is None
    # Weights without a prior, such as those of the package, begin a training with one.
    options = ["--recipe", str(recipe), "--start-from", str(out / "model"), "--steps", "1", "--optimizer.lr", "1e-9"]
    assert "prior_top1" in main([*options, "--optimizer.matrix-lr", "1e-9", "--out", str(tmp_path / "on")])
    later = LarpTokenizer.from_pretrained(tmp_path / "on" / "model")
    assert torch.allclose(later.encoder.blocks[0].mlp.fc1.weight, without.encoder.blocks[0].mlp.fc1.weight, atol=1e-6)


def test_nested_tokens_train_and_decode_from_any_prefix(recipe, finished, tmp_path):
    options = ["--recipe", str(recipe), "--model.nested", "--prefix-share", "1"]
    main([*options, "--out", str(tmp_path / "run")])
    model = LarpTokenizer.from_pretrained(tmp_path / "run/model")
    assert model.config.nested and model.decode(torch.zeros(1, 2, dtype=torch.long)).shape == (1, 3, 16, 16, 16)
    assert losses(tmp_path / "run") != losses(finished)


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


def same_weights(first: Path, second: Path, variant: str | None = None) -> bool:
    left, right = (LarpTokenizer.from_pretrained(out / "model", variant=variant) for out in (first, second))
    return left.weight_hash() == right.weight_hash()


def test_the_average_is_validated_saved_and_resumed(recipe, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    report = main(["--recipe", str(recipe), "--out", str(whole), "--ema", "0.5"])
    assert report["ema_psnr"] != report["psnr"] and lines(whole)[-1]["test_ema_psnr"] == report["ema_psnr"]
    last, averaged = (LarpTokenizer.from_pretrained(whole / "model", variant=v) for v in (None, "ema"))
    assert last.weight_hash() != averaged.weight_hash()
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "state/step-00000006")
    shutil.rmtree(cut / "model")
    again = main(["--recipe", str(recipe), "--out", str(cut), "--ema", "0.5", "--resume"])
    assert again["ema_psnr"] == report["ema_psnr"]
    assert same_weights(whole, cut) and same_weights(whole, cut, "ema")


def test_the_average_follows_codes_to_their_new_places(recipe, tmp_path):
    out = tmp_path / "run"
    main(["--recipe", str(recipe), "--out", str(out), "--ema", "0.999", "--steps", "9"])
    last, averaged = (LarpTokenizer.from_pretrained(out / "model", variant=v).codebook for v in (None, "ema"))
    assert (last * averaged).sum(-1).min() > 0.99, "some code is averaged over two places"


def test_epochs_are_passes_over_the_training_videos(recipe, tmp_path):
    out, options = tmp_path / "run", ["--steps", "None", "--epochs", "0.5", "--optimizer.warmup-epochs", "0.25"]
    videos = len(open_videos("shapes:count=24,size=16", "train"))
    report = main(["--recipe", str(recipe), "--out", str(out), *options, "--optimizer.schedule", "constant"])
    assert report["steps"] == round(0.5 * videos / 4) >= 2
    rates = [line["lr"] for line in lines(out) if "lr" in line]
    warm = round(0.25 * videos / 4)
    assert max(rates[:warm]) < rates[warm] == rates[-1] == 1e-3


def test_a_length_in_steps_and_in_epochs_is_refused(recipe, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--recipe", str(recipe), "--out", str(tmp_path / "run"), "--epochs", "2"])
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "steps = 6 and epochs = 2.0 are both given" in told and "--steps None" in told
    with pytest.raises(ConfigError, match="epochs = -1"):
        from_dict(TrainTokenizerConfig, {"epochs": -1.0}, where="here")
    assert from_dict(TrainTokenizerConfig, {}, where="here").in_steps(100).steps == 150_000


def test_the_priors_own_rate_is_in_the_log(recipe, tmp_path):
    options = ["--recipe", str(recipe), "--out", str(tmp_path / "run"), "--optimizer.prior-lr", "1e-4"]
    main([*options, "--optimizer.schedule", "constant", "--steps", "3"])
    rates = {name: lines(tmp_path / "run")[0][name] for name in ("lr", "prior_lr", "matrix_lr", "prior_matrix_lr")}
    assert rates == pytest.approx({"lr": 1e-3, "prior_lr": 1e-4, "matrix_lr": 0.02, "prior_matrix_lr": 0.002})
    with pytest.raises(ValueError, match=r"optimizer.* does not fit|does not fit.*optimizer"):
        main([*options[:-2], "--steps", "6", "--resume"])
    assert not (tmp_path / "run/config.resumed.json").exists()


def test_checkpointed_activations_change_no_loss(recipe, finished, tmp_path):
    main(["--recipe", str(recipe), "--out", str(tmp_path), "--engine.activation-checkpointing"])
    assert losses(tmp_path) == losses(finished) and same_weights(finished, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision", "accumulation"), [("1", "fp32", "1"), ("2", "bf16", "2")])
def test_sharded_engines_train_to_the_losses_of_whole_ones(recipe, tmp_path, stage, precision, accumulation):
    """Tokenizer and discriminator, a continuous start, codes that are moved, and the average."""
    common = ["--recipe", str(recipe), "--optimizer.name", "adamw", "--ema", "0.5", "--engine.precision", precision]
    reports = {}
    for sharding in ("0", stage):
        out = tmp_path / sharding
        options = ["--engine.zero-stage", sharding, "--engine.accumulation", accumulation, "--out", str(out)]
        reports[sharding] = main([*common, *options])
    for name in ("loss", "gan", "discriminator", "quantizer", "grad_norm"):
        whole, sharded = ([line[name] for line in lines(tmp_path / s) if name in line] for s in ("0", stage))
        assert whole and sharded == pytest.approx(whole, rel=1e-4 if precision == "fp32" else 2e-2), name
    for name in ("psnr", "ema_psnr"):
        assert reports[stage][name] == pytest.approx(reports["0"][name], abs=0.01)


def test_sharded_engines_resume_exactly(recipe, tmp_path):
    options = ["--recipe", str(recipe), "--optimizer.name", "adamw", "--engine.zero-stage", "2", "--ema", "0.9"]
    options += ["--engine.precision", "bf16", "--engine.accumulation", "2"]
    main([*options, "--out", str(tmp_path / "whole")])
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/state/step-00000006")
    main([*options, "--out", str(tmp_path / "cut"), "--resume"])
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert all(same_weights(tmp_path / "whole", tmp_path / "cut", variant) for variant in (None, "ema"))


def test_wandb_that_is_asked_for_but_absent_leaves_no_run(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb = 'larp'.*pip install"):
        main(["--recipe", str(recipe), "--out", str(tmp_path / "run"), "--wandb", "larp"])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_shard_average_and_resume_like_one(recipe, tmp_path):
    """ZeRO 2 for both engines, accumulation and the average, interrupted once.

    Rounding decides which codes are moved: 0.7 % of a loss in float32, 2.5 % in bf16.
    """
    options = ["--recipe", str(recipe), "--optimizer.name", "adamw", "--engine.zero-stage", "2", "--ema", "0.9"]
    options += ["--engine.precision", "fp32", "--engine.accumulation", "2"]
    one = main([*options, "--out", str(tmp_path / "1")])
    command = [Path(sys.executable).parent / "deepspeed", "--master_port", str(free_port()), "--num_accelerators", "2"]

    def launch(*more):
        words = [str(w) for w in (*command, ROOT / "training/train_tokenizer.py", *options, *more)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    launch("--out", tmp_path / "2")
    two = json.loads((tmp_path / "2/report.json").read_text())
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-2)
    assert {name: two[name] for name in ("psnr", "ema_psnr")} == pytest.approx(
        {name: one[name] for name in ("psnr", "ema_psnr")}, abs=0.02
    )
    shutil.copytree(tmp_path / "2", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/state/step-00000006")
    launch("--out", tmp_path / "cut", "--resume")
    assert losses(tmp_path / "cut") == losses(tmp_path / "2")
    assert all(same_weights(tmp_path / "cut", tmp_path / "2", variant) for variant in (None, "ema"))


@pytest.mark.slow
@pytest.mark.parametrize("gan", [pytest.param("0", marks=pytest.mark.long), "0.3"])
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


@pytest.mark.slow
def test_processes_without_a_launcher_train_to_the_losses_of_one(recipe, tmp_path):
    options = ["--recipe", str(recipe), "--steps", "30"]
    main([*options, "--out", str(tmp_path / "1")])
    command = [sys.executable, ROOT / "training/train_tokenizer.py", *options, "--engine.processes", "2"]
    words = [str(word) for word in (*command, "--out", tmp_path / "2")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "2 process(es)" in done.stdout + done.stderr, done.stdout + done.stderr
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)
    again = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert again.returncode == 2 and again.stderr.count("holds a run already") == 1, again.stderr


@pytest.mark.parametrize("name", ["larp-l-long", *sorted(path.stem for path in RECIPES.glob("tokenizer-*.toml"))])
def test_shipped_recipes_build(name):
    config = from_dict(TrainTokenizerConfig, load_recipe(name, RECIPES), where=name)
    with torch.device("meta"):
        LarpTokenizer(config.model)


def test_real_clips_train(recipe, tmp_path, clips_root):
    (tmp_path / "odd").mkdir()
    for clip in (clips_root / "odd").iterdir():
        if clip.stat().st_size < 50_000:  # the others take long, and are decoded by the tests of larp/data
            (tmp_path / "odd" / clip.name).symlink_to(clip)
    options = ["--recipe", str(recipe), "--data", f"folder:{tmp_path / 'odd'}"]
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
        (["--eval-clips", "0"], SystemExit, "2"),
        (["--batch-size", "0"], SystemExit, "2"),
        (["--workers", "-1"], SystemExit, "2"),
        (["--mix-peak", "2"], SystemExit, "2"),
        (["--mix-ramp", "-1"], SystemExit, "2"),
        (["--steps", "None", "--epochs", "inf"], SystemExit, "2"),
        (["--steps", "None", "--epochs", "nan"], SystemExit, "2"),
        (["--temperature-start", "nan"], SystemExit, "2"),
        (["--loss.l2", "nan"], SystemExit, "2"),
        (["--optimizer.lr", "inf"], SystemExit, "2"),
        (["--steps", "1"], ValueError, r"continuous = 0\.34 of 1 steps"),
        (["--temperature-start", "0.1", "--model.no-stochastic"], SystemExit, "2"),
        (["--recipe", "tokenizer-shape32"], ConfigError, "tokenizer-shapes32"),
    ],
)
def test_bad_options_name_the_option_and_the_remedy(recipe, tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        main(["--recipe", str(recipe), "--out", str(tmp_path / "run"), *options])


def test_a_run_is_not_overwritten(recipe, cut):
    before = (cut / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="--resume"):
        main(["--recipe", str(recipe), "--out", str(cut)])
    with pytest.raises(ValueError, match="num_tokens"):
        main(["--recipe", str(recipe), "--out", str(cut), "--steps", "9", "--resume", "--model.num-tokens", "3"])
    assert (cut / "metrics.jsonl").read_text() == before


class FakeI3D(torch.nn.Module):
    """Answers like the published file: with the mean colour of each frame."""

    def forward(self, x: torch.Tensor, rescale: bool = True, resize: bool = False, return_features: bool = False):
        return torch.nn.functional.pad(x.mean(dim=(3, 4)).flatten(1), (0, 352))


@pytest.mark.slow
def test_validation_takes_lpips_and_rfvd_where_their_weights_are_at_hand(recipe, tmp_path, monkeypatch, capsys):
    for source in (VGG16, LPIPS_HEADS, I3D_STYLEGANV):
        monkeypatch.delenv(source.variable, raising=False)
    monkeypatch.setenv("LARP_CACHE", str(tmp_path / "empty"))
    options = ["--recipe", str(recipe), "--steps", "2", "--eval-clips", "4"]
    assert {"lpips", "rfvd"}.isdisjoint(main([*options, "--out", str(tmp_path / "without")]))
    assert (
        capsys.readouterr().out.count("validation without rFVD: its weights were not found. Run `larp-mllm fetch i3d`")
        == 1
    )
    state = Lpips().state_dict()
    torch.save({key: value for key, value in state.items() if key.startswith("features")}, tmp_path / "vgg.pth")
    torch.save({f"lin{i}.model.1.weight": state[f"heads.{i}"] for i in range(5)}, tmp_path / "heads.pth")
    torch.jit.script(FakeI3D()).save(str(tmp_path / "i3d.pt"))
    for source, name in ((VGG16, "vgg.pth"), (LPIPS_HEADS, "heads.pth"), (I3D_STYLEGANV, "i3d.pt")):
        monkeypatch.setenv(source.variable, str(tmp_path / name))
    monkeypatch.setattr(WeightFile, "verify", lambda self, path: file_sha256(path))
    report = main([*options, "--out", str(tmp_path / "with")])
    assert report["lpips"] > 0 and report["rfvd"] > report["rfvd_floor"] > 0
    assert {"test_lpips", "test_rfvd", "test_rfvd_floor"} <= set(lines(tmp_path / "with")[-1])
    main([*options, "--out", str(tmp_path / "trained"), "--loss.lpips", "0.1"])
    assert all(line["lpips"] > 0 for line in lines(tmp_path / "trained") if "loss" in line)


def test_a_run_with_lpips_in_its_loss_needs_the_weights(recipe, tmp_path, monkeypatch):
    for source in (VGG16, LPIPS_HEADS):
        monkeypatch.delenv(source.variable, raising=False)
    monkeypatch.setenv("LARP_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"vgg16-397923af\.pth.*--loss\.lpips 0"):
        main(["--recipe", str(recipe), "--out", str(tmp_path / "run"), "--loss.lpips", "1"])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_resumed_run_names_the_videos_that_were_skipped_before(recipe, tmp_path, monkeypatch, capsys):
    items = list(open_videos("shapes:count=8,size=16").items)
    (tmp_path / "videos").mkdir()
    for number, item in enumerate(items):
        (tmp_path / "videos" / f"{number}.mp4").write_bytes(item.path.read_bytes())
    (tmp_path / "videos/broken.mp4").write_bytes(b"<html>404</html>")
    options = ["--recipe", str(recipe), "--data", f"folder:{tmp_path / 'videos'}", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(train_tokenizer.backend, "stop_requested", lambda: True)
    train_tokenizer.main([*options, "--steps", "20"])  # stops at the tenth
    # As if the steps after it met other videos.
    shutil.copy(tmp_path / "videos/0.mp4", tmp_path / "videos/broken.mp4")
    monkeypatch.undo()
    report = main([*options, "--steps", "20", "--resume"])
    assert (
        report["skipped_videos"] == 1 and "skipped broken.mp4: does not begin like a video" in capsys.readouterr().out
    )
