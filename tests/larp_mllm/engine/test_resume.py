"""What --resume finds in a run folder: a run that ended, and options that are others than the run began with."""

import json

from larp_mllm.engine import report as resuming
from larp_mllm.engine.report import ended, going_on

import pytest


def test_what_changed_is_told_against_the_beginning_of_the_run(tmp_path):
    began = {"out": "a", "resume": False, "batch_size": 8, "text": ["a"], "joint": {"steps": 3, "llm_lr": None}}
    (tmp_path / "config.json").write_text(json.dumps(began))
    same = began | {"out": "b", "resume": True, "text": ("a",)}
    assert going_on(tmp_path, same, 2, []) == []
    first = going_on(tmp_path, same | {"joint": {"steps": 3, "llm_lr": 0.5}}, 2, [])
    assert first == [{"step": 2, "changed": {"joint.llm_lr": [None, 0.5]}}]
    assert going_on(tmp_path, same | {"joint": {"steps": 3, "llm_lr": 0.5}}, 4, first) == first
    assert going_on(tmp_path, same | {"batch_size": 4}, 4, first)[1:] == [
        {"step": 4, "changed": {"batch_size": [8, 4]}}
    ]
    assert going_on(tmp_path, same, 4, first)[1:] == [{"step": 4, "changed": {}}]


@pytest.mark.parametrize(
    ("steps", "report", "model"),
    [
        (4, {}, True),  # more are asked for
        (3, {"samples": None}, True),  # killed while it was judged
        (3, {"steps": 2}, True),  # of an earlier end
        (3, None, True),
        (3, {}, False),
    ],
)
def test_a_run_has_ended_if_nothing_of_it_is_missing(tmp_path, monkeypatch, steps, report, model):
    class State:
        step = 3

    monkeypatch.setattr(resuming, "newest_state", lambda run: State())
    whole = {"steps": 3, "samples": []}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").touch()
    (tmp_path / "report.json").write_text(json.dumps(whole))
    assert ended(tmp_path, 3) == whole
    changed = {name: value for name, value in (whole | (report or {})).items() if value is not None}
    (tmp_path / "report.json").write_text("{" if report is None else json.dumps(changed))
    if not model:
        (tmp_path / "model/model.safetensors").unlink()
    assert ended(tmp_path, steps) is None
