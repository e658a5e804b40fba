"""train_tokenizer.py by the clock, on crops, from trained weights, and with the best weights kept."""

import json
import time
from pathlib import Path

from larp.engine import clock
from larp.engine.checkpoint import newest_state
from larp.hub import EMA
from larp.metrics.lpips import Lpips, MeanLpips
from larp.metrics.validation import TokenizerValidation, quality
from larp.models.tokenizer import LarpTokenizer
from tests.training.test_train_tokenizer import TINY
from training import train_tokenizer
from training.train_tokenizer import main

import pytest
import torch


@pytest.fixture(autouse=True)
def data(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LARP_DATA", str(tmp_path_factory.getbasetemp() / "clock-data"))


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Ticking:
    """A clock that moves by so many seconds whenever a step asks for it."""

    def __init__(self, seconds: float):
        self.now, self.seconds = 0.0, seconds

    def monotonic(self) -> float:
        self.now += self.seconds
        return self.now


def test_a_run_by_the_clock_keeps_the_shape_of_its_recipe(recipe, tmp_path, monkeypatch):
    """However many steps it becomes: the quantizer starts at a third of the time, the discriminator at half of it."""
    monkeypatch.setattr(clock, "time", Ticking(0.5))
    report = main(["--recipe", str(recipe), "--out", str(tmp_path / "run"), "--minutes", "0.2"])
    found = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert report["steps"] == found[-1]["step"] > 8
    places = [line["place"] for line in found]
    assert places == sorted(places) and places[-1] == 6
    # A line tells of the step before its place.
    for before, line in zip([0, *places], found, strict=False):
        assert ("quantizer" in line) == (before >= 2), before
        assert ("gan" in line) == (before >= 3), before
    assert found[-1]["lr"] < 0.2 * max(line["lr"] for line in found)
    assert [line["step"] for line in lines(tmp_path / "run") if "test_psnr" in line] == [report["steps"]]


def test_a_run_by_the_clock_goes_on_where_it_was(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(clock, "time", Ticking(0.5))
    out = tmp_path / "run"
    stop = iter([False] * 4 + [True] + [False] * 100)
    monkeypatch.setattr(train_tokenizer.backend, "stop_requested", lambda: next(stop))
    options = ["--recipe", str(recipe), "--out", str(out), "--minutes", "1"]
    stopped = main(options)["stopped_at"]
    place = [line["place"] for line in lines(out) if "loss" in line][-1]
    report = main([*options, "--resume"])
    after = [line for line in lines(out) if "loss" in line and line["step"] > stopped]
    assert place <= after[0]["place"] < place + 1 and after[-1]["place"] == 6
    assert report["steps"] > stopped
    assert main([*options, "--resume"])["steps"] == report["steps"], "a run that has its minutes trains no more"


def test_it_ends_in_time(recipe, tmp_path):
    began = time.monotonic()
    report = main(["--recipe", str(recipe), "--out", str(tmp_path / "run"), "--minutes", "0.03"])
    assert report["steps"] >= 3 and time.monotonic() - began < 30


def test_crops_train_on_varied_clips(recipe, tmp_path):
    options = ["--recipe", str(recipe), "--crop", "--flip"]
    report = main([*options, "--out", str(tmp_path / "run")])
    again = main([*options, "--out", str(tmp_path / "again")])
    plain = main(["--recipe", str(recipe), "--out", str(tmp_path / "plain")])
    assert report["psnr"] == again["psnr"] != plain["psnr"]


def test_the_best_weights_are_kept(recipe, tmp_path, monkeypatch):
    out, figures = tmp_path / "run", iter([11.0, 13.0, 12.0])
    saved = []
    real = TokenizerValidation.reconstruct

    def reconstruct(self, engine, model):
        result = real(self, engine, model)
        result.metrics["psnr"] = next(figures)
        saved.append({name: value.clone() for name, value in model.state_dict().items()})
        return result

    monkeypatch.setattr(TokenizerValidation, "reconstruct", reconstruct)
    report = main(["--recipe", str(recipe), "--out", str(out), "--eval-every", "2", "--keep-best"])
    assert report["best"]["psnr"] == 13.0 and report["best"]["step"] == 4 and report["psnr"] == 12.0
    kept = LarpTokenizer.from_pretrained(out / "model").state_dict()
    assert all(torch.equal(kept[name], value) for name, value in saved[1].items())
    assert not all(torch.equal(kept[name], value) for name, value in saved[2].items())


def test_a_run_killed_after_a_validation_goes_on_with_its_best_weights(recipe, tmp_path, monkeypatch):
    """The checkpoint of a step holds the `best` of the validation at that step, so that no worse weights replace these later."""
    out, figures = tmp_path / "run", iter([13.0, 12.0])
    real = TokenizerValidation.reconstruct

    def reconstruct(self, engine, model):
        result = real(self, engine, model)
        result.metrics["psnr"] = next(figures)
        return result

    monkeypatch.setattr(TokenizerValidation, "reconstruct", reconstruct)
    options = ["--recipe", str(recipe), "--out", str(out), "--eval-every", "3", "--save-every", "3", "--keep-best"]
    with monkeypatch.context() as patch:
        killed = iter([False, True])  # before the checkpoint of step 6 is written
        save = train_tokenizer.save_training
        patch.setattr(train_tokenizer, "save_training", lambda *a, **k: (next(killed) and 1 / 0) or save(*a, **k))
        with pytest.raises(ZeroDivisionError):
            main(options)
    state = newest_state(out)
    assert (state.step, state.extra["best"]["step"], state.extra["best"]["psnr"]) == (3, 3, 13.0)
    figures = iter([12.0])
    assert main([*options, "--resume"])["best"]["step"] == 3


def test_figures_with_lpips_stand_above_those_without():
    assert quality({"psnr": 20.0}) < quality({"psnr": 21.0}) < quality({"psnr": 20.0, "lpips": 0.5})
    assert quality({"psnr": 25.0, "lpips": 0.3}) < quality({"psnr": 20.0, "lpips": 0.2})
    assert quality({"psnr": 25.0, "ema_psnr": 1.0}) < quality({"psnr": 2.0})


def test_a_run_begins_with_trained_weights(recipe, tmp_path, capsys):
    main(["--recipe", str(recipe), "--out", str(tmp_path / "first"), "--ema", "0.5"])
    options = ["--recipe", str(recipe), "--start-from", str(tmp_path / "first")]
    main([*options, "--out", str(tmp_path / "second"), "--steps", "1", "--optimizer.lr", "1e-9", "--optimizer.matrix-lr", "1e-9",
          "--reset-codes-every", "0"])  # fmt: skip
    first = LarpTokenizer.from_pretrained(tmp_path / "first/model", variant=EMA).state_dict()
    second = LarpTokenizer.from_pretrained(tmp_path / "second/model").state_dict()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-6, rtol=1e-6)
    assert "quantizer" in lines(tmp_path / "second")[0], "trained codes need no start without a quantizer"
    with pytest.raises(
        ValueError, match=r"start_from .*first is another model than this run's: num_tokens was 4, is 2"
    ):
        main([*options, "--out", str(tmp_path / "third"), "--model.num-tokens", "2"])
    still = ["--steps", "1", "--optimizer.lr", "1e-9", "--optimizer.matrix-lr", "1e-9", "--reset-codes-every", "0"]
    main([*options, "--out", str(tmp_path / "more"), "--model.num-tokens", "8", "--model.prior.positions", "8", *still])
    more = LarpTokenizer.from_pretrained(tmp_path / "more/model").state_dict()
    assert more["queries"].shape[0] == 2 * first["queries"].shape[0] and "prior.pos_emb" in more
    torch.testing.assert_close(more["head.weight"], first["head.weight"], atol=1e-6, rtol=1e-6)


def test_lpips_begins_in_its_time_and_looks_at_some_frames(recipe, tmp_path, monkeypatch):
    seen = []

    class Looking(Lpips):
        def forward(self, a, b):
            seen.append(a.shape)
            return super().forward(a, b)

    monkeypatch.setattr(train_tokenizer, "load_lpips", Looking)
    options = ["--loss.lpips", "1", "--loss.lpips-start", "4", "--loss.lpips-frames", "3"]
    main(["--recipe", str(recipe), "--out", str(tmp_path / "run"), *options])
    found = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert ["lpips" in line for line in found] == [False] * 4 + [True] * 2
    assert seen[:2] == [(4, 3, 3, 16, 16)] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "0"], "minutes = 0.0 must be positive and finite"),
        (["--minutes", "nan"], "minutes = nan must be positive and finite"),
        (["--loss.lpips-frames", "-1"], "loss.lpips_frames must be 0 or more"),
        (
            ["--loss.lpips", "1", "--loss.lpips-frames", "17"],
            "loss.lpips_frames = 17 is more than the 16 frames of a clip",
        ),
    ],
)
def test_mistakes_are_named(recipe, tmp_path, options, message, capsys):
    with pytest.raises(SystemExit):
        main(["--recipe", str(recipe), "--out", str(tmp_path / "run"), *options])
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_loss_that_is_never_reached_is_noted(recipe, tmp_path, capsys):
    options = ["--steps", "3", "--loss.gan-start", "3", "--loss.lpips-start", "9", "--loss.lpips-frames", "17"]
    main(["--recipe", str(recipe), "--out", str(tmp_path / "run"), *options])
    said = capsys.readouterr().out
    assert "note: loss.gan_start = 3 is not reached in 3 steps: the run trains without loss.gan\n" in said
    assert "loss.lpips_start" not in said, "it has no weight"


@pytest.mark.parametrize(("net", "kind"), [("both", MeanLpips), ("alexnet", Lpips)])
def test_the_network_of_the_loss_is_chosen(net, kind, fetched):
    for name in ("lpips", "lpips-alexnet"):
        fetched(name)
    assert isinstance(train_tokenizer.load_lpips(net), kind)
