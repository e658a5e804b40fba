"""What --resume finds in a run folder: a finished run, and changed options."""

import json

from larp_mllm.engine import training_report as reports
from larp_mllm.engine.training_report import finished_report, option_changes

import pytest


def test_changed_options_are_compared_with_the_first_ones(tmp_path):
    began = {"out": "a", "resume": False, "batch_size": 8, "text": ["a"], "joint": {"steps": 3, "llm_lr": None}}
    (tmp_path / "config.json").write_text(json.dumps(began))
    same = began | {"out": "b", "resume": True, "text": ("a",)}
    assert option_changes(tmp_path, same, 2, []) == []
    first = option_changes(tmp_path, same | {"joint": {"steps": 3, "llm_lr": 0.5}}, 2, [])
    assert first == [{"step": 2, "changed": {"joint.llm_lr": [None, 0.5]}}]
    assert option_changes(tmp_path, same | {"joint": {"steps": 3, "llm_lr": 0.5}}, 4, first) == first
    assert option_changes(tmp_path, same | {"batch_size": 4}, 4, first)[1:] == [
        {"step": 4, "changed": {"batch_size": [8, 4]}}
    ]
    assert option_changes(tmp_path, same, 4, first)[1:] == [{"step": 4, "changed": {}}]
    assert option_changes(tmp_path, same | {"data": {"records": "1f"}}, 2, []) == [], "begun by an earlier version"
    (tmp_path / "config.json").write_text(json.dumps(same | {"data": {"records": "1f", "text": "3b"}}))
    now = option_changes(tmp_path, same | {"data": {"records": "2e", "tokens": "7c"}}, 2, [])
    assert now == [{"step": 2, "changed": {"data.records": ["1f", "2e"]}}]


@pytest.mark.parametrize(
    ("steps", "report", "model"),
    [
        (4, {}, True),  # more are asked for
        (3, {"samples": None}, True),  # killed while it was evaluated
        (3, {"steps": 2}, True),  # an older report
        (3, None, True),
        (3, {}, False),
    ],
)
def test_a_run_with_something_missing_is_not_finished(tmp_path, monkeypatch, steps, report, model):
    class State:
        step = 3

    monkeypatch.setattr(reports, "newest_state", lambda run: State())
    whole = {"steps": 3, "samples": []}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").touch()
    (tmp_path / "report.json").write_text(json.dumps(whole))
    assert finished_report(tmp_path, 3) == whole
    changed = {name: value for name, value in (whole | (report or {})).items() if value is not None}
    (tmp_path / "report.json").write_text("{" if report is None else json.dumps(changed))
    if not model:
        (tmp_path / "model/model.safetensors").unlink()
    assert finished_report(tmp_path, steps) is None
