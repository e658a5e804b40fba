"""metrics.jsonl, the progress bar and TensorBoard."""

import importlib.machinery
import json
import sys
import types

from larp.engine.backend import Ranks
from larp.engine.log import RunLog, check_wandb, read_metrics
from larp.files import write_json

import pytest
import torch


def test_lines_hold_step_time_and_values(tmp_path, capsys):
    with RunLog(tmp_path, Ranks(), 10, show=["loss"]) as log:
        log.metrics(1, {"loss": 0.5, "psnr": torch.tensor(20.0)})
        log.progress(2)
        log.metrics(3, {"loss": float("nan")})
        log.say("half of it")
        log.metrics(4, {"loss": 0.5, "psnr": 21})
    lines = read_metrics(tmp_path)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (3, None), (4, 0.5)]
    assert lines[0]["psnr"] == 20.0 and lines[0]["time"] <= lines[1]["time"]
    shown = capsys.readouterr()
    assert "half of it" in shown.out and "loss=0.5" in shown.err and "psnr" not in shown.err


def test_a_resumed_run_has_one_line_for_each_step(tmp_path):
    with RunLog(tmp_path, Ranks(), 10) as log:
        for step in range(1, 6):
            log.metrics(step, {"loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    with RunLog(tmp_path, Ranks(), 10, resume_step=3) as log:
        log.metrics(4, {"loss": 2.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 1), (2, 1), (3, 1), (4, 2)]


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    with RunLog(tmp_path / "run", Ranks(rank=1, world_size=2), 10) as log:
        log.metrics(1, {"loss": 1.0})
        log.progress(2)
        log.say("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    with RunLog(tmp_path, Ranks(), 10) as log:
        log.metrics(1, {"loss": 0.5})
    assert list((tmp_path / "tensorboard").glob("events.*"))


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for Weights & Biases."""
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
    fake.runs = []

    class Run:
        def __init__(self, settings):
            self.settings, self.lines, self.finished = settings, [], False
            self.id = settings["id"] or "abc"

        def log(self, values, step):
            self.lines.append((step, values))

        def finish(self):
            self.finished = True

    def init(**settings):
        fake.runs.append(Run(settings))
        return fake.runs[-1]

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_the_same_numbers_and_a_resumed_run_continues_there(tmp_path, wandb):
    for resume_step in (0, 1):
        with RunLog(tmp_path / "run", Ranks(), 10, resume_step, wandb="larp", config={"steps": 10}) as log:
            log.metrics(resume_step + 1, {"loss": torch.tensor(0.5)})
    first, second = wandb.runs
    assert first.settings["project"] == "larp" and first.settings["name"] == "run"
    assert first.settings["config"] == {"steps": 10} and first.settings["dir"] == str(tmp_path / "run")
    assert first.lines == [(1, {"loss": 0.5})] and second.lines == [(2, {"loss": 0.5})]
    assert (first.settings["id"], second.settings["id"]) == (None, "abc") and first.finished


def test_wandb_is_used_only_where_asked_and_by_the_main_rank(tmp_path, wandb):
    with RunLog(tmp_path, Ranks(), 10) as log:
        log.metrics(1, {"loss": 0.5})
    RunLog(tmp_path, Ranks(rank=1, world_size=2), 10, wandb="larp").close()
    assert wandb.runs == [] and not (tmp_path / "wandb-id.txt").exists()


def test_missing_or_failing_wandb_states_the_remedy(tmp_path, wandb, monkeypatch):
    def init(**settings):
        raise wandb.errors.Error("no API key")

    wandb.init = init
    with pytest.raises(ValueError, match=r"does not start \(no API key\).*wandb login.*WANDB_MODE=offline"):
        RunLog(tmp_path, Ranks(), 10, wandb="larp")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb = 'larp'.*not installed: pip install 'larp-mllm\[wandb\]'"):
        check_wandb("larp")
    check_wandb(None)


def test_write_json_writes_null_for_numbers_that_are_not_finite(tmp_path):
    write_json(tmp_path / "x.json", {"a": float("nan"), "b": [1.5, (float("inf"), 2)], "c": {"d": -float("inf")}})
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == {
        "a": None, "b": [1.5, [None, 2]], "c": {"d": None},
    }  # fmt: skip


def test_write_json_is_atomic(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2} and [p.name for p in tmp_path.iterdir()] == ["a.json"]
