"""Runs of training/train_mllm.py that are stopped or killed, and resumed."""

import json
import os
import shutil
import subprocess
import sys
import time
from datetime import datetime

from larp.engine.checkpoint import newest_state
from larp.engine.log import read_metrics as metrics
from larp_mllm.engine import results, staged_run
from larp_mllm.processing import chat
from tests.larp_mllm.chat_templates import CHATML
from tests.larp_mllm.engine.runs import ROOT, SMALL, STAGES, lines, same, stop_after, weights
from tests.larp_mllm.tiny import tiny_cache
from training import train_mllm

import pytest
from transformers import AutoTokenizer


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_weights(base, train, tmp_path, monkeypatch):
    options = ("--base", str(base), *STAGES)
    train(tmp_path / "whole", *options)
    stopped = []
    for steps in (1, 2, 2):  # in align, at its end, in joint
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            stopped.append(train(tmp_path / "cut", *options, *(["--resume"] if stopped else []))["stopped_at"])
    assert stopped == [1, 3, 5]
    report = train(tmp_path / "cut", *options, "--resume")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert [line["step"] for line in lines(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6, 7]
    assert all(stage["seconds"] > 0 for stage in report["stages"])
    with pytest.raises(ValueError, match="--resume"):
        train(tmp_path / "cut", *options)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["0", pytest.param("3", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (train_mllm, "train_step"),
        (staged_run, "save_adapter"),
        (staged_run, "load_adapter"),
        (results, "write_current"),
    ],
)
def test_a_killed_run_resumes_to_the_same_weights(base, train, tmp_path, monkeypatch, module, name, zero):
    """As by kill -9: nothing is saved at the end, and the run resumes from its last checkpoint."""
    options = ("--base", str(base), *STAGES, "--engine.zero-stage", zero)
    train(tmp_path / "whole", *options)
    real = getattr(module, name)

    def dies(*arguments):
        # In training: after step 5 of 7, the checkpoints being those of steps 3 and 4.
        if name != "train_step" or len(lines(tmp_path / "cut")) >= 5:
            raise ZeroDivisionError
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, dies)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / "cut", *options)
    train(tmp_path / "cut", *options, "--resume")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.mark.slow
def test_a_run_resumed_on_another_day_has_the_same_weights(base, train, tmp_path, monkeypatch):
    folder = shutil.copytree(base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "Today is {{ strftime_now('%d %b %Y') }}.\n" + CHATML
    tokenizer.save_pretrained(folder)
    options = ("--base", str(folder), *STAGES, "--tasks.chat", "5", "--tasks.own-answers", "0")

    class Day(datetime):
        today = 1

        @classmethod
        def now(cls, *_):
            return cls(2026, 11, cls.today)

    monkeypatch.setattr(chat, "datetime", Day)
    train(tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        train(tmp_path / "cut", *options)
    Day.today = 2
    train(tmp_path / "cut", *options, "--resume")
    train(tmp_path / "other", *options)
    whole = weights(tmp_path / "whole")
    assert same(whole, weights(tmp_path / "cut")) and not same(whole, weights(tmp_path / "other"))
    assert json.loads((tmp_path / "cut/config.json").read_text())["date"] == "2026-11-01"


@pytest.mark.slow
def test_sigterm_saves_and_another_process_resumes(base, cache, prose, train, tmp_path):
    options = ["--base", str(base), "--align.steps", "20", "--joint.steps", "20", "--log-every", "1"]
    data = ["--tokens", str(cache), "--out", str(tmp_path / "cut"), "--eval-text", prose, *SMALL]
    command = [sys.executable, str(ROOT / "training/train_mllm.py"), *data, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    stopped = 0
    for upto in (5, 25):  # in align, in joint
        process = subprocess.Popen([*command, *(["--resume"] if stopped else [])], env=environment, cwd=tmp_path)
        while process.poll() is None and not (
            metrics(tmp_path / "cut") and metrics(tmp_path / "cut")[-1]["step"] >= upto
        ):
            time.sleep(0.02)
        process.terminate()
        assert process.wait(timeout=300) == 143
        assert newest_state(tmp_path / "cut").step > stopped
        stopped = newest_state(tmp_path / "cut").step
    assert 20 < stopped < 40
    train(tmp_path / "cut", *options, "--resume")
    train(tmp_path / "whole", *options)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_run_killed_after_its_last_step_is_completed_and_a_finished_run_is_not_changed(
    train, tmp_path, monkeypatch, capsys
):
    options = ("--joint.steps", "3", "--save-every", "2", "--log-every", "10")
    train(tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        patch.setattr(results, "write_current", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / "cut", *options)
    monkeypatch.setattr(train_mllm, "train_step", lambda *_: pytest.fail("trained again"))
    report = train(tmp_path / "cut", *options, "--resume", "--joint.llm-lr", "7")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert lines(tmp_path / "cut")[-1]["step"] == 3
    # The rates in the report are those of the training.
    whole = json.loads((tmp_path / "whole/report.json").read_text())
    assert [{**stage, "seconds": 0} for stage in report["stages"]] == [{**s, "seconds": 0} for s in whole["stages"]]
    assert report["eval"] == whole["eval"] and report["resumed"][0]["step"] == report["steps"] == 3
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(train_mllm, "build", lambda *_: pytest.fail("loaded something"))
    assert train(tmp_path / "cut", *options, "--resume", "--joint.llm-lr", "9", "--adapter", "free") == report
    output = capsys.readouterr().out
    assert f"{tmp_path}/cut is finished, at step 3: its report and" in output
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


@pytest.mark.slow
def test_the_report_lists_the_options_that_changed_at_resumptions(base, train, tmp_path, monkeypatch):
    def go(*options, steps=1000):
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            return train(tmp_path / "run", "--base", str(base), *STAGES, *options)

    go("--align.adapter-lr", "1e-3", steps=4)  # one step into joint
    go("--resume", "--joint.llm-lr", "5e-3", "--align.adapter-lr", "0.5", "--z-loss", "0.1", steps=1)
    report = go("--resume", "--align.adapter-lr", "1e-3")
    assert [stage["adapter_lr"] for stage in report["stages"]] == [1e-3, 5e-4]
    assert report["stages"][1]["llm_lr"] == 1e-3
    changed = {"joint.llm_lr": [None, 5e-3], "align.adapter_lr": [1e-3, 0.5], "z_loss": [0.0, 0.1]}
    assert report["resumed"] == [{"step": 4, "changed": changed}, {"step": 5, "changed": {}}]
    assert lines(tmp_path / "run")[4]["llm_lr"] > 1e-3 > lines(tmp_path / "run")[5]["llm_lr"], "as it was"


def test_a_run_stopped_at_its_last_step_is_completed(train, tmp_path, monkeypatch):
    stop_after(monkeypatch, 5)
    assert train(tmp_path / "run", "--joint.steps", "5")["steps"] == 5
    assert (tmp_path / "run" / "report.json").is_file()


def test_a_run_in_minutes_resumes_in_its_second_stage(base, train, tmp_path, monkeypatch):
    # The steps of the schedule do not tell the stage: the second stage begins at about the third step.
    options = ("--base", str(base), "--align.steps", "1000", "--joint.steps", "1000", "--minutes", "0.04")
    entered = []
    own = staged_run.StagedRun.next_stage
    monkeypatch.setattr(staged_run.StagedRun, "next_stage", lambda run: (own(run), entered.append(1)))
    monkeypatch.setattr(train_mllm, "stop_requested", lambda: bool(entered))
    stopped = train(tmp_path / "run", *options)
    assert newest_state(tmp_path / "run").loader_state["stage"] == "joint" and "stopped_at" in stopped
    monkeypatch.undo()
    report = train(tmp_path / "run", *options, "--resume")
    assert report["steps"] > stopped["stopped_at"] and sum(s["steps"] for s in report["stages"]) == report["steps"]


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(base, train, tmp_path, capsys):
    small = ("--joint.steps", "2")
    train(tmp_path / "run", *small)
    before = weights(tmp_path / "run")
    for tokens, options, words in (
        (tiny_cache(tmp_path, seed=7), (), "video_tokenizer was .{16}, is .{16}"),
        (None, ("--tiny.layers", "2"), "tiny.layers was 1, is 2"),
        (tiny_cache(tmp_path / "a", captions=["zebras"]), (), "text_tokenizer was .{16}, is .{16}"),
        (None, ("--align.steps", "2"), "stage was joint, is align"),
        (None, ("--adapter", "free"), "adapter was codebook, is free"),
    ):
        given = {} if tokens is None else {"tokens": tokens}
        with pytest.raises(ValueError, match=f"does not fit this run: .*{words}"):
            train(tmp_path / "run", *small, "--joint.steps", "3", "--resume", *options, **given)
    assert same(before, weights(tmp_path / "run"))
    assert not (tmp_path / "run/config.resumed.json").exists() and "going on" not in capsys.readouterr().out
    lora = ("--base", str(base), "--align.steps", "0", "--joint.steps", "2")
    train(tmp_path / "lora", *lora)
    with pytest.raises(ValueError, match="lora_rank was 2, is 4"):
        train(tmp_path / "lora", *lora, "--joint.steps", "3", "--joint.lora-rank", "4", "--resume")
    # The size of tiny bases does not matter for another base.
    train(tmp_path / "lora", *lora, "--joint.steps", "3", "--tiny.layers", "3", "--resume")
