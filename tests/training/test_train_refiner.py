"""training/train_tokenizer.py with train = refiner: the codes of a trained tokenizer stay as they are."""

import json
import tomllib

from larp.config import from_dict
from larp.models.growing import with_refiner
from larp.models.tokenizer import LarpTokenizer
from tests.training.test_train_tokenizer import TINY
from training.train_tokenizer import TrainTokenizerConfig, main

import pytest
import torch

REFINER = ["--train", "refiner", "--model.refiner-width", "8"]
# Beside what the tiny recipe says: among that codes that are reset, which a refiner must not do.
OPTIONS = [
    "--steps",
    "8",
    "--eval-every",
    "8",
    "--save-every",
    "2",
    "--loss.gan",
    "0",
    "--optimizer.name",
    "adamw",
    "--optimizer.schedule",
    "constant",
]


@pytest.fixture
def trained(tmp_path):
    torch.manual_seed(0)
    tokenizer = LarpTokenizer(from_dict(TrainTokenizerConfig, tomllib.loads(TINY), where="here").model)
    torch.nn.init.normal_(tokenizer.head.weight, std=0.1)
    return tokenizer.save_pretrained(tmp_path / "trained")


@pytest.fixture
def run(tmp_path):
    """Train with the recipe and these options."""
    (tmp_path / "recipe.toml").write_text(TINY)
    return lambda *options: main(["--recipe", str(tmp_path / "recipe.toml"), *OPTIONS, *map(str, options)])


def test_only_the_refiner_is_trained(run, trained, tmp_path):
    out = tmp_path / "run"
    run(*REFINER, "--start-from", trained, "--out", out)
    before, after = LarpTokenizer.from_pretrained(trained), LarpTokenizer.from_pretrained(out / "model")
    for name, value in after.state_dict().items():
        assert name.startswith("refiner.") or torch.equal(value, before.state_dict()[name]), name
    assert after.refiner.last.weight.abs().sum() > 0
    clip = torch.rand(2, 3, 16, 16, 16)
    assert torch.equal(before.encode(clip), after.encode(clip))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["l1"] for line in lines if "l1" in line]
    assert len(losses) == 8 and losses[-1] < losses[0]


def test_a_refiner_goes_on_and_a_run_of_it_stays_one(run, trained, tmp_path):
    first = with_refiner(LarpTokenizer.from_pretrained(trained), 8)
    torch.nn.init.normal_(first.refiner.last.weight, std=0.01)
    first.save_pretrained(tmp_path / "refined")
    out = tmp_path / "run"
    run(*REFINER, "--start-from", tmp_path / "refined", "--out", out)
    after = LarpTokenizer.from_pretrained(out / "model").refiner.last.weight
    assert 0 < (after - first.refiner.last.weight).abs().max() < 0.1
    with pytest.raises(ValueError, match="train was refiner"):
        run("--model.refiner-width", 8, "--start-from", trained, "--out", out, "--resume", "--steps", 9)


def test_mistakes_are_told(run, trained, tmp_path):
    with pytest.raises(ValueError, match="name it with --start-from"):
        run(*REFINER, "--out", tmp_path / "run")
    with pytest.raises(ValueError, match=r"needs the width of one: --model.refiner-width 64"):
        TrainTokenizerConfig(train="refiner")
    assert not (tmp_path / "run").exists()
