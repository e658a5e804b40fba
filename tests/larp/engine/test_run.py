"""What every training does around its loop, on a tiny engine."""

import json
from dataclasses import dataclass
from pathlib import Path

from larp.engine.checkpoint import save_state
from larp.engine.clock import Clock
from larp.engine.run import check_run, open_log, open_training, save_training, step_metrics, stopped

import pytest


@dataclass(frozen=True)
class Options:
    out: Path
    resume: bool = False
    wandb: str | None = None


def test_a_run_is_opened_saved_and_resumed_with_the_time_that_it_had(new_engine, train, tmp_path):
    engines, clock = {"model": new_engine()}, Clock(10, minutes=2.0)
    assert open_training(Options(tmp_path), {"seed": 1}, clock, engines, {"size": 3}) is None
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 1}
    train(engines["model"], 0, 2)
    clock.start(2, elapsed=60.0)
    save_training(Options(tmp_path), clock, engines, {"size": 3}, {"row": 7}, {"best": 0.5})

    engines, clock = {"model": new_engine()}, Clock(10, minutes=2.0)
    with pytest.raises(ValueError, match="size was 3, is 4"):
        open_training(Options(tmp_path, resume=True), {}, clock, engines, {"size": 4})
    saved = open_training(Options(tmp_path, resume=True), {}, clock, engines, {"size": 3})
    assert saved.loader_state["row"] == 7 and saved.extra == {"best": 0.5}
    assert clock.step == engines["model"].step_count == 2
    assert clock.elapsed == pytest.approx(60, abs=5) and clock.position == pytest.approx(5, abs=0.5)


def test_a_tokenizer_run_of_an_earlier_version_keeps_its_time(new_engine, tmp_path):
    engines, clock = {"model": new_engine()}, Clock(10, minutes=2.0)
    save_state(engines, tmp_path, 1, {}, {"elapsed": 30.0})
    open_training(Options(tmp_path, resume=True), {}, clock, engines, {})
    assert clock.elapsed == pytest.approx(30, abs=5)


def test_a_step_is_logged_with_its_rates_and_a_stop_says_how_to_go_on(new_engine, train, ranks, tmp_path, capsys):
    engine, clock = new_engine(), Clock(10)
    train(engine, 0, 1)
    clock.advance()
    values = step_metrics(engine, clock)
    assert values["grad_norm"] > 0 and values["lr"] == engine.learning_rates["lr"]
    with open_log(Options(tmp_path), ranks, clock, ()) as log:
        log.metrics(clock.step, values)
        assert stopped(Options(tmp_path), clock.step, log) == {"stopped_at": 1}
    assert f"stopped at step 1, saved; go on with --resume --out {tmp_path}" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["grad_norm"] == values["grad_norm"]


def test_what_cannot_run_is_refused_first(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb = 'larp'.*pip install"):
        check_run(Options(tmp_path / "run", wandb="larp"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: choose another place with --out"):
        check_run(Options(tmp_path / "file"))


def test_what_a_killed_removal_left_is_removed_when_the_run_is_resumed(new_engine, tmp_path):
    """The last checkpoint of a run is followed by no other, which would remove it."""
    engines = {"model": new_engine()}
    for step in (1, 2, 3):
        save_state(engines, tmp_path, step, {}, {})
    half = tmp_path / "state/step-00000001"
    half.mkdir()
    (half / "random-0.pt").write_text("")
    open_training(Options(tmp_path, resume=True), {}, Clock(3), engines, {})
    assert sorted(path.name for path in half.parent.iterdir()) == ["step-00000002", "step-00000003"]
