"""training/extract_tokens.py and training/train_generator.py on a tiny random tokenizer and the built-in videos."""

import dataclasses
import json
import re
from pathlib import Path

from larp.config import from_dict, load_recipe
from larp.data.tokens import TokenCache
from larp.engine.backend import EngineConfig
from larp.engine.optimizer import OptimizerConfig
from larp.generator import SIZES, LarpGenerator
from larp.prior import PriorConfig
from larp.tokenizer import LarpTokenizer, TokenizerConfig
from training.extract_tokens import ExtractTokensConfig, extract
from training.extract_tokens import main as extract_main
from training.train_generator import RECIPES, SamplingConfig, TrainGeneratorConfig, main, train

import pytest
import torch


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


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_class_run_ends_with_a_model_a_report_and_samples(home, tmp_path, capsys):
    report = train(tiny_run(home, tmp_path, sampling=SamplingConfig(clips=2, guidance=2.0)))
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
    assert losses(tmp_path) == seen
    train(dataclasses.replace(half, optimizer=OptimizerConfig("adamw", lr=1e-3, warmup=1)))
    assert "optimizer.lr was 0.01, is 0.001" in capsys.readouterr().out and len(losses(tmp_path)) == 4


def test_checkpointed_activations_change_nothing(home, tmp_path):
    kept = tiny_run(home, tmp_path / "kept")
    train(kept)
    engine = dataclasses.replace(kept.engine, activation_checkpointing=True)
    train(dataclasses.replace(kept, out=tmp_path / "again", engine=engine))
    assert losses(tmp_path / "again") == losses(tmp_path / "kept")


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
    train(tiny_run(home, tmp_path / "class", steps=2, **caches))  # a cache with conditions serves classes as well
    model = LarpGenerator.from_pretrained(tmp_path / "model")
    assert model.config.task == "frame-prediction" and model.config.class_names == ()
    assert len(list((tmp_path / "samples").glob("*.mp4"))) == 2


def test_class_dropout_shows_clips_of_no_class(home, tmp_path):
    config = tiny_run(home, tmp_path, class_dropout=0.9, steps=2)
    train(config)
    before = LarpGenerator.from_pretrained(tmp_path / "model").cls_embedding.embedding_table.weight[-1]
    train(dataclasses.replace(config, class_dropout=0.0, out=tmp_path / "never"))
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
    assert "condition_frames is 5, expected 0" in message("--tokens", tokens, "--eval-tokens", str(home / "test-5"))
    assert "unknown generator size 'huge'" in message("--tokens", tokens, "--size", "huge")
    assert not (tmp_path / "run" / "config.json").exists(), "a mistake leaves no run behind"
    small = tmp_path / "small"
    data = f"folder:{four_videos(home, tmp_path)}"
    extract(ExtractTokensConfig(tokenizer=str(home / "tok"), data=data, split="all", out=small))
    assert re.search(f"{small} holds 4 videos.*--eval-tokens DIR", message("--tokens", str(small)))
    with pytest.raises(ValueError, match="zero_stage 3"):
        tiny_run(home, tmp_path, engine=EngineConfig(zero_stage=3))
    with pytest.raises(ValueError, match="no such folder"):
        extract_main(["--tokenizer", str(tmp_path / "absent")])
    data = ["--data", f"folder:{tmp_path / 'four'}", "--split", "all"]
    with pytest.raises(ValueError, match=r"no token cache can be written to .*config.json"):
        extract_main(["--tokenizer", str(home / "tok"), *data, "--out", str(home / "tok" / "config.json")])


def test_data_without_classes_says_which_data_have_them(home, tmp_path):
    clips = home / "clips"
    clips.symlink_to(next((home / "data").rglob("*.mp4")).parent, target_is_directory=True)
    with pytest.raises(ValueError, match=r"have no class. Data with classes: ucf101:ROOT, shapes:"):
        train(TrainGeneratorConfig(tokenizer=str(home / "tok"), data=f"folder:{clips}", out=tmp_path))


@pytest.mark.parametrize("name", ["generator-shapes32", "generator-ucf64", "larp-l-long-ar"])
def test_recipes(name):
    config = from_dict(TrainGeneratorConfig, load_recipe(name, RECIPES), name)
    assert config.size in SIZES and config.steps > config.optimizer.warmup
    if name == "larp-l-long-ar":
        assert (
            SIZES[config.size] == (30, 20, 1280)
            and config.optimizer.lr == 6e-4
            and config.optimizer.weight_decay == 0.05
        )
