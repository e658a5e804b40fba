"""eval/speed_small.py: what it compares and refuses. Its figures are not tested: they are the machine's."""

import json

from bench.timing import Lap
from eval import speed_small
from eval.speed_small import SmallSpeedConfig

import pytest


def test_both_are_timed_and_written_down(tmp_path, monkeypatch, capsys):
    runs = []

    def run(config, options, steps):
        runs.append((options, steps))
        return (0.2, 3 + 0.2 * steps) if options else (0.1, 4 + 0.1 * steps)

    monkeypatch.setattr(speed_small, "run", run)
    monkeypatch.setattr(speed_small, "bf16_weights", lambda config: pair(Lap(6, 6), Lap(12, 12)))
    out = tmp_path / "small.json"
    record = speed_small.main(["--steps", "40", "--out", str(out)])
    assert json.loads(out.read_text()) == record
    fp32 = ("--engine.precision", "fp32", "--engine.processes", "1")
    assert runs == [((), 20), ((), 60), (fp32, 20), (fp32, 60)] * 3
    step = record["training step"]
    assert step["time_ratio"]["median"] == pytest.approx(0.5) and step["recipe"]["cpu_seconds"] == pytest.approx(0.1)
    assert "one float32 process 200 ms, 200 CPU ms" in (text := capsys.readouterr().out)
    assert text.count("2.00 times as fast") == 2


def pair(ours, theirs):
    return {
        "bf16": speed_small.summary([ours] * 3),
        "fp32": speed_small.summary([theirs] * 3),
        **speed_small.ratios([ours] * 3, [theirs] * 3),
    }


def test_too_few_runs_are_refused():
    with pytest.raises(ValueError, match="pairs must be at least 3"):
        SmallSpeedConfig(pairs=2)


def test_a_training_that_fails_says_why(tmp_path, monkeypatch):
    (tmp_path / "training").mkdir()
    (tmp_path / "training/train_tokenizer.py").write_text("import sys; sys.exit('no recipe of this name')")
    monkeypatch.setattr(speed_small, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="status 1: no recipe of this name"):
        speed_small.run(SmallSpeedConfig(), (), 20)
