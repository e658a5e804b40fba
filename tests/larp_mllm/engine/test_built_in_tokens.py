"""Trainings without a token cache: tokens of the built-in captioned videos."""

import json
import subprocess
import sys
from pathlib import Path

from larp.data.token_cache import TokenCache
from larp_mllm.engine import built_in_tokens
from larp_mllm.engine.built_in_tokens import make_built_in_tokens
from tests.larp_mllm.engine.runs import ROOT

import pytest

SCRIPTS = ROOT / "training"
POPEN = subprocess.Popen


@pytest.fixture
def typed(monkeypatch, tmp_path, cache):
    """The commands that are run, as lists of words; they do nothing, but the tokenizer of the tiny cache is then at hand."""
    commands: list[list[str]] = []

    def popen(command, env):
        commands.append(command[1:])
        assert not {"RANK", "WORLD_SIZE"} & set(env)
        if "train_tokenizer.py" in command[1]:
            trained = Path("runs/tokenizer/model")
            trained.parent.mkdir(parents=True)
            trained.symlink_to(TokenCache.open(cache).tokenizer)
        return POPEN([sys.executable, "-c", ""])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(built_in_tokens.subprocess, "Popen", popen)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    return commands


def test_a_tokenizer_is_trained_where_none_is_at_hand(typed, capsys):
    make_built_in_tokens(SCRIPTS, Path("runs/tokens"), None)
    training, extraction = typed
    assert training == [str(SCRIPTS / "train_tokenizer.py"), "--out", "runs/tokenizer"]
    assert extraction[0] == str(SCRIPTS / "extract_tokens.py")
    assert extraction[extraction.index("--tokenizer") + 1] == "runs/tokenizer/model"
    assert "built-in captioned videos" in capsys.readouterr().out
    typed.clear()
    make_built_in_tokens(SCRIPTS, Path("runs/tokens"), None)
    assert [Path(command[0]).name for command in typed] == ["extract_tokens.py"]


def test_an_interrupted_tokenizer_training_goes_on(typed):
    Path("runs/tokenizer").mkdir(parents=True)
    Path("runs/tokenizer/config.json").write_text("{}")
    with pytest.raises(FileExistsError):  # of the stand-in, which makes the folder
        make_built_in_tokens(SCRIPTS, Path("runs/tokens"), None)
    assert typed[0][-1] == "--resume"


def test_the_given_tokenizer_encodes_videos_of_its_size(typed, cache):
    name = TokenCache.open(cache).tokenizer
    make_built_in_tokens(SCRIPTS, Path("runs/tokens"), name)
    (extraction,) = typed
    config = json.loads((Path(name) / "config.json").read_text())
    assert f"shapes:size={config['height']},frames={config['num_frames']}" in extraction


def test_a_step_that_fails_ends_the_training(typed, monkeypatch, cache):
    failing = lambda command, env: POPEN([sys.executable, "-c", "raise SystemExit(3)"])  # noqa: E731
    monkeypatch.setattr(built_in_tokens.subprocess, "Popen", failing)
    with pytest.raises(ValueError, match=r"train_tokenizer\.py ended with status 3: mend what it says above"):
        make_built_in_tokens(SCRIPTS, Path("runs/tokens"), None)


def test_a_stopped_training_stops_the_step(typed, monkeypatch):
    processes = []

    def popen(command, env):
        processes.append(POPEN([sys.executable, "-c", "import time; time.sleep(60)"]))
        return processes[-1]

    monkeypatch.setattr(built_in_tokens.subprocess, "Popen", popen)
    monkeypatch.setattr(built_in_tokens.signals, "stop_flag", lambda: True)
    with pytest.raises(ValueError, match="the same command goes on"):
        make_built_in_tokens(SCRIPTS, Path("runs/tokens"), None)
    assert processes[0].returncode is not None
