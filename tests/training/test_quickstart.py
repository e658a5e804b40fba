"""`make quickstart` in a few seconds: first videos of the shipped weights, then the chain; it goes on where it stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

from training import quickstart
from training.quickstart import SHIPPED_SCORE, Stages, show_shipped

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_whole_way(tmp_path):
    out = tmp_path / "quick"
    options = ["--minutes", "0.1", "--data", "shapes:count=48", "--prompt", "a blue square"]
    command = [sys.executable, str(ROOT / "training/quickstart.py"), "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    figures = {"psnr", "prior_top1", "colour_accuracy", "direction_accuracy", "shape_accuracy"}
    assert figures <= set(report) and all(0 <= report[name] <= 100 for name in figures)
    names = {"shipped", "videos", "tokenizer", "tokens_train", "language_model", "generate", "evaluation", "total"}
    assert names <= set(report["seconds"])
    for name in ("generated.mp4", "generated.png", "report.json", "shapes.json", "shapes.png"):
        assert (out / name).stat().st_size > 0 and str(out / name) in done.stdout
    shown = ["000-a-person-surfing.mp4", "001-a-horse-race.mp4", "002-a-red-circle-moving-left.mp4", "sheet.png"]
    assert sorted(path.name for path in (out / "shipped").iterdir()) == shown
    assert all(str(out / "shipped" / name) in done.stdout for name in shown)
    assert done.stdout.index(shown[-1]) < done.stdout.index("== tokenizer")
    assert "trained here" in done.stdout and "shipped model" in done.stdout
    # By the clock: its steps are those of the time, not those of the recipe.
    assert json.loads((out / "tokenizer/report.json").read_text())["steps"] < 3600
    # A killed language-model stage: what was finished is kept.
    (out / "report.json").unlink()
    seconds = json.loads((out / "stages.json").read_text())
    del seconds["language_model"]
    (out / "stages.json").write_text(json.dumps(seconds))
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "shipped: done before" in again.stdout and "tokenizer: done before" in again.stdout
    assert (out / "report.json").exists()


def test_the_shipped_weights_are_what_the_first_videos_are_of(tmp_path, monkeypatch, capsys):
    def run(command, env, check):
        assert command[1] == "-c" and "model='tiny'" in command[2]
        (tmp_path / "shipped").mkdir()
        (tmp_path / "shipped/sheet.png").touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(quickstart.subprocess, "run", run)
    show_shipped(tmp_path / "shipped", Stages(tmp_path))
    assert str(tmp_path / "shipped/sheet.png") in capsys.readouterr().out


def test_slow_stages_leave_less_time_to_those_that_follow(tmp_path):
    stages = Stages(tmp_path)
    stages.seconds = {"shipped": 50.0, "videos": 60.0, "tokenizer": 120.0}
    assert stages.minutes_left(7) == 4 and stages.minutes_left(3) == 0.5


def test_a_score_of_other_weights_is_not_shown_as_that_of_the_shipped_model(tmp_path, monkeypatch, capsys):
    known = json.loads((ROOT / SHIPPED_SCORE).read_text())
    (tmp_path / "tokenizer").mkdir()
    figures = {"psnr": 20.0, "mean_colour_psnr": 17.0, "prior_top1": 0.5, "codes_used": 0.5}
    (tmp_path / "tokenizer/report.json").write_text(json.dumps(figures))
    (tmp_path / "shapes.json").write_text(json.dumps(known))
    monkeypatch.setattr(quickstart, "checkpoint_hashes", lambda folder: known["protocol"]["checkpoint"])
    quickstart.report(tmp_path, "a red circle moving left", Stages(tmp_path))
    assert f"shape {known['shape_accuracy']:6.1%}   {SHIPPED_SCORE}" in capsys.readouterr().out
    monkeypatch.setattr(quickstart, "checkpoint_hashes", lambda folder: {})
    quickstart.report(tmp_path, "a red circle moving left", Stages(tmp_path))
    assert "not measured with these weights" in capsys.readouterr().out
