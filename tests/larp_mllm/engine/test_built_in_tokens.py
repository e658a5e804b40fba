"""Trainings without a token cache: tokens of the built-in captioned videos."""

import json
import subprocess
import sys
from pathlib import Path

from larp.data.token_cache import TokenCache
from larp_mllm.engine import built_in_tokens
from larp_mllm.engine.built_in_tokens import COUNT, make_built_in_tokens
from larp_mllm.locate import shipped
from tests.larp_mllm.engine.runs import ROOT

import pytest

SCRIPT = ROOT / "training/extract_tokens.py"
POPEN = subprocess.Popen


@pytest.fixture
def typed(monkeypatch, tmp_path):
    """The commands that are run, as lists of words; they do nothing."""
    commands: list[list[str]] = []

    def popen(command, env):
        commands.append(command[1:])
        assert not {"RANK", "WORLD_SIZE"} & set(env)
        return POPEN([sys.executable, "-c", ""])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(built_in_tokens.subprocess, "Popen", popen)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    return commands


def test_the_tokenizer_of_the_package_encodes_a_limited_number_of_videos(typed, capsys):
    make_built_in_tokens(SCRIPT, Path("runs/tokens"), None)
    data = f"shapes:size=64,frames=16,count={COUNT}"
    options = ["--tokenizer", str(shipped("tokenizer")), "--data", data, "--out", "runs/tokens"]
    assert typed == [[str(SCRIPT), *options]]
    assert "built-in captioned videos" in capsys.readouterr().out


def test_the_given_tokenizer_encodes_videos_of_its_size(typed, cache):
    name = TokenCache.open(cache).tokenizer
    make_built_in_tokens(SCRIPT, Path("runs/tokens"), name)
    (extraction,) = typed
    config = json.loads((Path(name) / "config.json").read_text())
    assert f"shapes:size={config['height']},frames={config['num_frames']}" in extraction


def test_an_extraction_that_fails_ends_the_training(typed, monkeypatch):
    failing = lambda command, env: POPEN([sys.executable, "-c", "raise SystemExit(3)"])  # noqa: E731
    monkeypatch.setattr(built_in_tokens.subprocess, "Popen", failing)
    with pytest.raises(ValueError, match=r"extract_tokens\.py ended with status 3: mend what it says above"):
        make_built_in_tokens(SCRIPT, Path("runs/tokens"), None)


def test_a_stopped_training_stops_the_extraction(typed, monkeypatch):
    processes = []

    def popen(command, env):
        processes.append(POPEN([sys.executable, "-c", "import time; time.sleep(60)"]))
        return processes[-1]

    monkeypatch.setattr(built_in_tokens.subprocess, "Popen", popen)
    monkeypatch.setattr(built_in_tokens.signals, "stop_flag", lambda: True)
    with pytest.raises(ValueError, match="the same command goes on"):
        make_built_in_tokens(SCRIPT, Path("runs/tokens"), None)
    assert processes[0].returncode is not None
