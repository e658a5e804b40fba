"""training/extract_tokens.py and training/train_generator.py on a tiny random tokenizer and the built-in videos."""

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from larp.data.token_cache import TokenCache
from larp.data.video import probe
from larp.engine.backend import EngineConfig, Ranks
from larp.engine.checkpoint import newest_state
from larp.engine.code_batches import SHARED, CachedCodes, open_data
from larp.engine.generator_run import find_training
from larp.engine.optimizer import OptimizerConfig
from larp.engine.samples import SamplingConfig
from larp.metrics.code_prediction import predict_codes
from larp.models.generator import LarpGenerator
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig
from larp.sampling.options import GuidedSampling
from larp.sampling.sample import generate
from larp_mllm.locate import find_generator, shipped
from training import train_generator
from training.extract_tokens import ExtractTokensConfig, extract
from training.extract_tokens import main as extract_main
from training.train_generator import Trainer, TrainGeneratorConfig, build_model, finish, main, train

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a tokenizer and token caches of both splits, conditions included."""
    folder = tmp_path_factory.mktemp("generator")
    torch.manual_seed(0)
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("width", 16), ("depth", 1), ("heads", 2))
    }
    shape = dict(num_frames=16, height=16, width=16, patch_size=(8, 8, 8), num_tokens=6, codebook_size=32, code_dim=8)
    tokenizer = LarpTokenizer(TokenizerConfig(**shape, **sides, init="balanced", prior=PriorConfig(enabled=False)))
    torch.nn.init.normal_(tokenizer.head.weight, std=0.1)
    tokenizer.save_pretrained(folder / "tok")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LARP_DATA", str(folder / "data"))
        for split in ("train", "test"):
            for given in (0, 5):
                out = folder / f"{split}-{given}"
                extract(
                    ExtractTokensConfig(
                        tokenizer=str(folder / "tok"),
                        data="shapes:count=48,size=16",
                        split=split,
                        out=out,
                        condition_frames=given,
                    )
                )
    return folder


def four_videos(home: Path, folder: Path) -> Path:
    """A folder of four of the built-in videos."""
    (folder / "four").mkdir()
    for path in sorted((home / "data").rglob("*.mp4"))[:4]:
        (folder / "four" / path.name).symlink_to(path)
    return folder / "four"


def tiny_run(home: Path, out: Path, **changes) -> TrainGeneratorConfig:
    settings = dict(
        tokens=home / "train-0", eval_tokens=home / "test-0", out=out, steps=6, batch_size=8, eval_every=3, log_every=1
    )
    settings |= dict(sampling=SamplingConfig(clips=0), optimizer=OptimizerConfig("adamw", lr=1e-2, warmup=1))
    return TrainGeneratorConfig(**settings | changes)


@pytest.fixture(scope="module")
def finished(home) -> Path:
    """The run of `tiny_run` as it is, only to be read."""
    train(tiny_run(home, home / "finished"))
    return home / "finished"


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_class_run_ends_with_a_model_a_report_and_samples(home, tmp_path, capsys):
    report = train(tiny_run(home, tmp_path, sampling=SamplingConfig(clips=2, guidance_scale=2.0)))
    assert report["bits_per_token"] < report["uniform_bits_per_token"] == 5
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert f"top-1 {report['top1']:.3f}, top-5 {report['top5']:.3f}" in capsys.readouterr().out
    assert report["bits_per_clip"] == pytest.approx(6 * report["bits_per_token"]) and report["top1"] <= report["top5"]
    model = LarpGenerator.from_pretrained(tmp_path / "model")
    assert model.config.class_names[:2] == ("red circle", "red square")
    assert model.config.tokenizer_hash == LarpTokenizer.from_pretrained(home / "tok").weight_hash()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "000-red-circle.mp4",
        "001-red-square.mp4",
        "sheet.png",
    ]
    assert find_generator() == str(tmp_path / "model")
    known = find_training(find_generator())
    assert known.data.startswith("shapes:") and known.fps and known.tokenizer == str(home / "tok")


def test_a_resumed_run_takes_the_same_steps(home, tmp_path):
    half = tiny_run(
        home, tmp_path / "parts", dropout=0.0, optimizer=OptimizerConfig("adamw", lr=1e-2, schedule="constant")
    )
    train(dataclasses.replace(half, out=tmp_path / "whole"))
    train(dataclasses.replace(half, steps=3))
    with pytest.raises(ValueError, match="--resume"):
        train(half)
    train(dataclasses.replace(half, resume=True))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "parts")) == 6


def test_resuming_refuses_other_data_but_not_another_learning_rate(home, tmp_path, capsys):
    half = tiny_run(home, tmp_path, steps=3)
    train(half)
    half = dataclasses.replace(half, resume=True, steps=4)
    seen = losses(tmp_path)
    changes = {
        "tokens.condition_frames was 0, is 5": dict(tokens=home / "train-5", eval_tokens=home / "test-5"),
        "eval_tokens.split was test, is train": dict(eval_tokens=None),
        "seed was 0, is 1": dict(seed=1),
        "batch_size was 8, is 4": dict(batch_size=4),
    }
    for words, change in changes.items():
        with pytest.raises(ValueError, match=words):
            train(dataclasses.replace(half, **change))
    assert losses(tmp_path) == seen and not (tmp_path / "config.resumed.json").exists()
    train(dataclasses.replace(half, optimizer=OptimizerConfig("adamw", lr=1e-3, warmup=1)))
    assert "optimizer.lr was 0.01, is 0.001" in capsys.readouterr().out and len(losses(tmp_path)) == 4


def test_checkpointed_activations_change_nothing(home, finished, tmp_path):
    train(tiny_run(home, tmp_path, engine=EngineConfig(activation_checkpointing=True)))
    assert losses(tmp_path) == losses(finished)


def test_a_warm_up_in_epochs_counts_the_clips_of_the_cache(home, tmp_path):
    clips = len(TokenCache.open(home / "train-0"))
    settings = OptimizerConfig("adamw", lr=1e-2, schedule="constant", warmup_epochs=16 / clips)
    train(tiny_run(home, tmp_path, optimizer=settings))
    rates = [json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([1e-2 / 3, 2e-2 / 3, *[1e-2] * 4])
    with pytest.raises(ValueError, match=r"optimizer\.prior_lr.*no prior"):
        train(tiny_run(home, tmp_path / "other", optimizer=dataclasses.replace(settings, prior_lr=1e-3)))
    assert not (tmp_path / "other").exists()


def test_accumulation_changes_nothing_but_memory(home, tmp_path):
    once = tiny_run(home, tmp_path / "once", dropout=0.0)
    train(once)
    train(dataclasses.replace(once, out=tmp_path / "twice", engine=dataclasses.replace(once.engine, accumulation=2)))
    assert losses(tmp_path / "twice") == pytest.approx(losses(tmp_path / "once"), rel=1e-5)


def test_frame_prediction_run(home, tmp_path):
    caches = dict(tokens=home / "train-5", eval_tokens=home / "test-5")
    report = train(tiny_run(home, tmp_path, task="frame-prediction", sampling=SamplingConfig(clips=2), **caches))
    assert report["bits_per_token"] < 5
    assert find_generator() == str(shipped("generator")), "the default is for classes"
    train(tiny_run(home, tmp_path / "class", steps=2, **caches))  # a cache with conditions serves classes as well
    model = LarpGenerator.from_pretrained(tmp_path / "model")
    assert model.config.task == "frame-prediction" and model.config.class_names == ()
    assert len(list((tmp_path / "samples").glob("*.mp4"))) == 2


def tuned(home: Path, out: Path, **changes) -> TrainGeneratorConfig:
    """A frame prediction that drops conditions, without dropout of other kinds."""
    caches = dict(tokens=home / "train-5", eval_tokens=home / "test-5", task="frame-prediction", dropout=0.0)
    return tiny_run(home, out, **caches | dict(condition_dropout=0.5) | changes)


def test_frame_prediction_that_drops_its_condition_can_be_guided(home, tmp_path):
    train(tuned(home, tmp_path / "guided", sampling=SamplingConfig(clips=2)))
    model = LarpGenerator.from_pretrained(tmp_path / "guided" / "model")
    assert model.config.null_condition
    given = TokenCache.open(home / "test-5").batch(torch.arange(4), "frame-prediction")[1]
    fitting, none = (
        generate(model, given, GuidedSampling(guidance_scale=2.0), seed=1),
        generate(model, model.unconditional(given), seed=1),
    )
    assert not torch.equal(fitting, none)
    train(tuned(home, tmp_path / "never", condition_dropout=None, steps=2))
    assert not LarpGenerator.from_pretrained(tmp_path / "never" / "model").config.null_condition, "as published"


def test_sheets_on_the_way_change_nothing_else(home, finished, tmp_path):
    train(tiny_run(home, tmp_path / "shown", sampling=SamplingConfig(every=2, clips=3)))
    assert losses(tmp_path / "shown") == losses(finished)
    shown = sorted(path.name for path in (tmp_path / "shown/samples").glob("*.png"))
    assert shown == ["sheet.png", "step-00000002.png", "step-00000004.png"]
    sheets = [(tmp_path / "shown/samples" / name).read_bytes() for name in shown[1:]]
    assert sheets[0] != sheets[1], "they show what the weights of their step make"
    assert probe(next((tmp_path / "shown/samples").glob("*.mp4"))).fps == TokenCache.open(home / "test-0").frame_rate(0)


def test_a_run_whose_tokenizer_is_gone_trains_without_samples(home, tmp_path, capsys):
    for name in ("train-0", "test-0"):
        shutil.copytree(home / name, tmp_path / name)
        index = json.loads((tmp_path / name / "index.json").read_text())
        (tmp_path / name / "index.json").write_text(json.dumps(index | {"tokenizer": str(tmp_path / "gone")}))
    caches = dict(tokens=tmp_path / "train-0", eval_tokens=tmp_path / "test-0")
    report = train(tiny_run(home, tmp_path / "run", sampling=SamplingConfig(every=1, clips=2), **caches))
    assert report["finished"] and report["samples"] is None and not (tmp_path / "run/samples").exists()
    assert capsys.readouterr().out.count("no samples: ") == 1
    report = train(
        tiny_run(
            home, tmp_path / "told", tokenizer=str(home / "tok"), steps=2, sampling=SamplingConfig(clips=2), **caches
        )
    )
    assert report["samples"]


@pytest.mark.slow
def test_zero_stage_3_trains_validates_saves_and_resumes_like_stage_0(home, tmp_path):
    whole = tuned(home, tmp_path / "0", save_every=3)
    sharded = dataclasses.replace(whole, out=tmp_path / "3", engine=EngineConfig(zero_stage=3))
    sharded = dataclasses.replace(sharded, sampling=SamplingConfig(every=3, clips=2))
    reports = [train(config) for config in (whole, sharded)]
    for name in ("bits_per_token", "bits_per_clip", "top1", "parameters"):
        assert reports[1][name] == pytest.approx(reports[0][name], rel=1e-4)
    assert losses(tmp_path / "3") == pytest.approx(losses(tmp_path / "0"), rel=1e-4)
    assert (tmp_path / "3/samples/step-00000003.png").exists() and (tmp_path / "3/samples/sheet.png").exists()
    one, other = (LarpGenerator.from_pretrained(tmp_path / stage / "model").state_dict() for stage in "03")
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)
    shutil.copytree(tmp_path / "3", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/state/step-00000006")
    train(dataclasses.replace(sharded, out=tmp_path / "parts", resume=True, sampling=SamplingConfig(clips=0)))
    assert len(losses(tmp_path / "parts")) == 6 and losses(tmp_path / "parts") == losses(tmp_path / "3")


def test_an_average_of_the_weights_lies_beside_them(home, tmp_path):
    report = train(tiny_run(home, tmp_path, ema=0.5))
    folder = tmp_path / "model"
    last, averaged = (LarpGenerator.from_pretrained(folder, variant=variant) for variant in (None, "ema"))
    assert last.weight_hash() != averaged.weight_hash()
    held_out = TokenCache.open(home / "test-0")
    for model, name in ((last, "bits_per_token"), (averaged, "ema_bits_per_token")):
        assert predict_codes(model, held_out, "class", 8, Ranks())["bits_per_token"] == pytest.approx(report[name])


def test_epochs_are_passes_over_the_clips(home, tmp_path):
    clips = len(TokenCache.open(home / "train-0"))
    assert train(tiny_run(home, tmp_path, steps=None, epochs=0.5))["steps"] == round(clips / 2 / 8)
    assert TrainGeneratorConfig().in_steps(clips).steps == 1000


def live_run(home: Path, out: Path, **changes) -> TrainGeneratorConfig:
    made = dict(tokens=None, live=True, tokenizer=str(home / "tok"), data="shapes:count=48,size=16", dropout=0.0)
    return tiny_run(home, out, **made | changes)


def test_live_codes_are_those_of_a_cache(home, tmp_path, monkeypatch):
    """The built-in videos are as long as a clip: there is one place in each."""
    monkeypatch.setenv("LARP_DATA", str(home / "data"))
    cache = TokenCache.open(home / "train-5")
    for task, test in (("class", "test-0"), ("frame-prediction", "test-5")):
        source, held_out, _ = open_data(live_run(home, tmp_path, task=task, eval_tokens=home / test), Ranks())
        rows = CachedCodes(cache, task, len(cache), len(cache), 0, Ranks())
        assert source.classes == rows.classes and len(source) == len(rows)
        chosen = [batch for step in range(len(cache) // 8) for batch in source.step(step)]
        assert [len(batch.codes) for batch in chosen] == [8] * (len(cache) // 8)
        seen = {
            (tuple(c.tolist()), tuple(k.flatten().tolist()))
            for b in chosen
            for c, k in zip(b.codes, b.condition, strict=True)
        }
        (whole,) = rows.step(0)
        assert seen == {
            (tuple(c.tolist()), tuple(k.flatten().tolist())) for c, k in zip(whole.codes, whole.condition, strict=True)
        }
        again = next(iter(source.step(1)))
        assert torch.equal(again.codes, chosen[1].codes), "a step has the same clips whenever it comes"
        assert all(held_out.key[name] == source.key[name] for name in (*SHARED, "condition_frames"))


def test_live_crops_and_rows_from_the_codebook(home, tmp_path, monkeypatch):
    monkeypatch.setenv("LARP_DATA", str(home / "data"))
    config = live_run(home, tmp_path / "run", flips=True, crop=True, codebook_rows=True)
    report = train(config)
    model = LarpGenerator.from_pretrained(tmp_path / "run" / "model")
    assert torch.equal(model.output.codebook, LarpTokenizer.from_pretrained(home / "tok").codebook)
    assert report["bits_per_token"] < 6 and report["parameters"] == model.num_parameters()
    # There is no cache of training clips; the one of held-out clips has the frame rate.
    assert find_training(find_generator()).fps == TokenCache.open(config.eval_tokens).fps[0]
    source, _, _ = open_data(config, Ranks())
    clips = next(iter(source.loader))["clip"]
    assert len(clips) == config.batch_size and clips.shape[1] == 3 and clips.dtype == torch.float32
    # The same from a cache, which names its tokenizer.
    cached = tiny_run(home, tmp_path / "cached", codebook_rows=True, steps=2)
    assert train(cached)["parameters"] == report["parameters"]


def test_live_run_trains_and_resumes(home, tmp_path, monkeypatch):
    monkeypatch.setenv("LARP_DATA", str(home / "data"))
    constant = OptimizerConfig("adamw", lr=1e-2, schedule="constant")
    config = live_run(home, tmp_path / "whole", optimizer=constant, flips=True)
    report = train(config)
    assert report["bits_per_token"] < 5 and report["clips"] == 48 and report["held_out_clips"] == 16
    train(dataclasses.replace(config, out=tmp_path / "parts", steps=3, workers=0))
    train(dataclasses.replace(config, out=tmp_path / "parts", resume=True))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"tokens.flips was True, is False"):
        train(dataclasses.replace(config, flips=False, resume=True, steps=7))
    with pytest.raises(ValueError, match=r"tokens.windows was one at a random place"):
        train(dataclasses.replace(config, live=False, tokens=home / "train-0", resume=True, steps=7))


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_with_sharded_weights_train_to_the_losses_of_one(home, tmp_path):
    """ZeRO 3, with clips encoded on the fly, dropped conditions and sheets on the way."""
    data = {"LARP_DATA": str(home / "data"), "OMP_NUM_THREADS": "1"}
    options = ["--live", "--tokenizer", home / "tok", "--data", "shapes:count=48,size=16", "--task", "frame-prediction"]
    options += ["--eval-tokens", home / "test-5", "--dropout", "0", "--condition-dropout", "0.5", "--steps", "4"]
    options += ["--batch-size", "8", "--log-every", "1", "--sampling.every", "2", "--sampling.clips", "3"]
    options += ["--optimizer.warmup", "0", "--optimizer.lr", "1e-2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LARP_DATA", data["LARP_DATA"])
        one = main([str(word) for word in (*options, "--out", tmp_path / "one")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += [ROOT / "training/train_generator.py", *options, "--out", tmp_path / "two", "--engine.zero-stage", "3"]
    done = subprocess.run([str(w) for w in command], env=os.environ | data, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    two = json.loads((tmp_path / "two/report.json").read_text())
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert two["bits_per_clip"] == pytest.approx(one["bits_per_clip"], rel=1e-4)
    assert two["parameters"] == one["parameters"] and (tmp_path / "two/samples/step-00000002.png").exists()


def test_condition_dropout_shows_clips_of_no_class(home, tmp_path):
    config = tiny_run(home, tmp_path, condition_dropout=0.9, steps=2)
    train(config)
    before = LarpGenerator.from_pretrained(tmp_path / "model").cls_embedding.embedding_table.weight[-1]
    train(dataclasses.replace(config, condition_dropout=0.0, out=tmp_path / "never"))
    after = LarpGenerator.from_pretrained(tmp_path / "never" / "model").cls_embedding.embedding_table.weight[-1]
    assert not torch.equal(before, after), "the row of no class learns only where classes are dropped"


def test_mistakes_end_with_a_message(home, tmp_path):
    def message(*argv: str) -> str:
        with pytest.raises(ValueError) as stopped:
            main([*argv, "--out", str(tmp_path / "run")])
        return str(stopped.value)

    tokens = str(home / "train-0")
    assert "nothing to train on: give --tokens DIR" in message()
    assert "no recipe 'generator-shape32'" in message("--recipe", "generator-shape32")
    assert "holds no token cache" in message("--tokens", str(tmp_path))
    assert "--condition-frames 5" in message("--tokens", tokens, "--task", "frame-prediction")
    given = ("--tokens", str(home / "train-5"), "--task", "frame-prediction")
    assert "condition_frames is 0, expected 5" in message(*given, "--eval-tokens", str(home / "test-0"))
    assert "is the same cache as tokens" in message("--tokens", tokens, "--eval-tokens", tokens)
    assert "unknown generator size 'huge'" in message("--tokens", tokens, "--size", "huge")
    assert not (tmp_path / "run" / "config.json").exists(), "a mistake leaves no run behind"
    small = tmp_path / "small"
    data = f"folder:{four_videos(home, tmp_path)}"
    extract(ExtractTokensConfig(tokenizer=str(home / "tok"), data=data, split="all", out=small))
    assert re.search(f"{small} holds 4 videos.*--eval-tokens DIR", message("--tokens", str(small)))
    assert "--tokenizer and --data" in message("--live")
    live = ["--live", "--tokenizer", str(home / "tok"), "--data", data]
    assert "3 of 3 videos have no class" in message(*live)
    assert "ema = 0.9 averages whole weights" in message("--tokens", tokens, "--ema", "0.9", "--engine.zero-stage", "3")
    with pytest.raises(ValueError, match="no such folder"):
        extract_main(["--tokenizer", str(tmp_path / "absent")])
    data = ["--data", f"folder:{tmp_path / 'four'}", "--split", "all"]
    with pytest.raises(ValueError, match=r"no token cache can be written to .*config.json"):
        extract_main(["--tokenizer", str(home / "tok"), *data, "--out", str(home / "tok" / "config.json")])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(live=True, tokens=Path("cache")), "tokens is cache: leave one of them out"),
        (dict(task="frame-prediction", sampling=SamplingConfig(guidance_scale=2.0)), "give --condition-dropout 0.1"),
        (dict(condition_dropout=0.0, sampling=SamplingConfig(guidance_final=2.0)), "give --condition-dropout 0.1"),
        (dict(condition_dropout=1.0), "condition_dropout is 1.0"),
        (dict(steps=3, epochs=2.0), "set one of them to None"),
        (dict(epochs=0.0), "epochs is 0.0"),
        (dict(steps=0), "steps is 0"),
        (dict(crop=True), "crop is for --live"),
    ],
)
def test_options_that_do_not_go_together(options, words):
    with pytest.raises(ValueError, match=words):
        TrainGeneratorConfig(**options)


def test_data_without_classes_says_which_data_have_them(home, tmp_path):
    clips = home / "clips"
    clips.symlink_to(next((home / "data").rglob("*.mp4")).parent, target_is_directory=True)
    with pytest.raises(ValueError, match=r"have no class. Data with classes: ucf101:ROOT, shapes:"):
        train(TrainGeneratorConfig(tokenizer=str(home / "tok"), data=f"folder:{clips}", out=tmp_path))


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_in_minutes_keeps_the_shape_of_its_schedule(home, tmp_path, monkeypatch):
    timed = tiny_run(home, tmp_path, steps=100, minutes=0.03, eval_every=50, save_every=50, log_every=1)
    asked = iter(range(1000))
    monkeypatch.setattr("training.train_generator.backend.stop_requested", lambda: next(asked) >= 4)
    report = train(timed)
    assert not report["finished"] and report["steps"] == report["stopped_at"] == 5
    monkeypatch.undo()
    elapsed = newest_state(tmp_path).loader_state["elapsed"]
    report = train(dataclasses.replace(timed, resume=True))
    told = lines(tmp_path)
    assert report["finished"] and report["steps"] == told[-1]["step"] == newest_state(tmp_path).step > 5
    assert [line["step"] for line in told] == list(range(1, report["steps"] + 1))
    assert told[-1]["place"] == 100 and told[-1]["minutes"] >= 0.03
    assert all(one["place"] <= other["place"] for one, other in itertools.pairwise(told))
    assert told[5]["minutes"] == pytest.approx(elapsed / 60, abs=0.005), "the first step of a process costs no time"
    assert told[-1]["lr"] < 0.2 * max(line["lr"] for line in told), "the rate falls with the time"
    judged = [line["place"] for line in told if "bits_per_token" in line]
    assert judged[-1] == 100 and 50 <= judged[0] < 100 and len(judged) == 2
    steps = report["steps"]
    assert train(dataclasses.replace(timed, resume=True))["steps"] == steps, "it has its length"


def test_a_run_killed_after_a_validation_goes_on_with_its_best_weights(home, tmp_path, monkeypatch):
    config = tiny_run(home, tmp_path, save_every=3, eval_every=3)
    scores = iter([3.0, 4.0])
    monkeypatch.setattr(
        train_generator,
        "validate",
        lambda *_: dict.fromkeys(("bits_per_token", "bits_per_clip", "top1", "top5"), next(scores)),
    )
    with monkeypatch.context() as patch:
        killed = iter([False, True])  # before the checkpoint of step 6 is written
        save = train_generator.save_training
        patch.setattr(train_generator, "save_training", lambda *a, **k: (next(killed) and 1 / 0) or save(*a, **k))
        with pytest.raises(ZeroDivisionError):
            train(config)
    state = newest_state(tmp_path)
    assert (state.step, state.extra["best_step"], state.extra["bits_per_token"]) == (3, 3, 3.0)
    scores = iter([4.0])
    assert train(dataclasses.replace(config, resume=True))["best_step"] == 3


@pytest.mark.parametrize("best", [{}, {"bits_per_token": math.nan}], ids=["none was the best", "the last"])
def test_a_run_without_a_finite_validation_ends_with_a_message(tmp_path, best):
    engine = SimpleNamespace(ranks=Ranks(), skipped_count=2, step_count=3)
    config = TrainGeneratorConfig(out=tmp_path)
    with pytest.raises(FloatingPointError, match=r"bits per code are not finite \(2 of 3 updates were skipped\)"):
        finish(Trainer(config, engine, None, None, None, None, best), {}, 0.0)
    assert not list(tmp_path.iterdir())


def test_a_run_begins_with_trained_weights_of_the_same_shape(home, finished, tmp_path):
    still = OptimizerConfig("adamw", lr=1e-9)
    begun = tiny_run(home, tmp_path / "on", steps=1, start_from=str(finished), optimizer=still, dropout=0.2)
    before = json.loads((finished / "report.json").read_text())
    assert train(begun)["bits_per_token"] == pytest.approx(before["bits_per_token"], abs=1e-4)
    train(tiny_run(home, tmp_path / "averaged", ema=0.5))
    averaged = LarpGenerator.from_pretrained(tmp_path / "averaged/model", variant="ema").state_dict()
    source = CachedCodes(TokenCache.open(home / "train-0"), "class", 8, 8, 0, Ranks())
    model = build_model(dataclasses.replace(begun, start_from=str(tmp_path / "averaged")), source, None)
    assert all(torch.equal(weights, averaged[name]) for name, weights in model.state_dict().items())
    with pytest.raises(ValueError, match=r"start_from .* another model.*depth was 4, is 6.*width was 128, is 192"):
        train(dataclasses.replace(begun, out=tmp_path / "other", size="mini"))
    assert not (tmp_path / "other").exists()
