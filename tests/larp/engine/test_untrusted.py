"""Checkpoints of strangers, and damaged ones: no code is run, and every fault is one line that names the folder."""

import json
import os
import pickle

from larp.engine.backend import EngineConfig
from larp.engine.checkpoint import load_state, newest_state, open_run, save_state
from tests.faults.damage import damaged, places

import pytest
import torch


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def one_line(folder, work, match="damaged|more than"):
    with pytest.raises(ValueError, match=match) as error:
        work()
    assert "\n" not in str(error.value) and str(folder) in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_what_a_strangers_checkpoint_wants_to_run_is_not_run(new_engine, train, tmp_path, stage):
    own, other = (new_engine(EngineConfig(zero_stage=stage)) for _ in range(2))
    train(own, 0, 1)
    save_state({"model": own}, tmp_path, 1, {}, {"best": 1.0})
    state = newest_state(tmp_path)
    files = [path for path in sorted(tmp_path.rglob("*.pt"))]
    assert len(files) >= 3
    for path in files:
        whole = path.read_bytes()
        content = torch.load(path, weights_only=False)
        torch.save({**content, "more": Code(f"touch {tmp_path}/ran")}, path)
        match = r"holds more than tensors and numbers \(posix\.system\), which could run code: .*copy the run again"
        one_line(state.folder, lambda: load_state({"model": other}, state) or state.extra, match)
        path.write_bytes(pickle.dumps(Code(f"touch {tmp_path}/ran")))
        one_line(state.folder, lambda: load_state({"model": other}, state) or state.extra)
        path.write_bytes(whole)
    assert not (tmp_path / "ran").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    load_state({"model": other}, state)


def test_a_damaged_marker_is_one_line_at_any_depth(new_engine, tmp_path):
    engines = {"model": new_engine()}
    loader = {"step": 1, "micro": 0, "elapsed": 2.0, "stage": {"seconds": [1.0]}}
    save_state(engines, tmp_path, 1, loader, model={"a": {"b": [1, 2]}})
    marker = newest_state(tmp_path).folder / "state.json"
    whole = json.loads(marker.read_text())
    refused = 0
    for where in places(whole):
        for new in (..., None, "x", -1, 1.5, [], {}, {"x": None}, [[]], True) if where else (None, "x", 1, [], {}):
            marker.write_text(json.dumps(damaged(whole, where, new)))
            try:
                state = open_run(tmp_path, {}, True, 9, engines, {"a": {"b": [1, 2]}})
                if state is not None:
                    load_state(engines, state, {"a": {"b": [1, 2]}})
            except ValueError as error:
                assert "\n" not in str(error), error
                refused += 1
    assert refused > 50


def test_damaged_bytes_of_a_checkpoint_are_one_line(new_engine, train, tmp_path):
    engine = new_engine()
    train(engine, 0, 1)
    save_state({"model": engine}, tmp_path, 1, {})
    state = newest_state(tmp_path)
    path = next((state.folder / "model").glob("*states.pt"))
    whole = path.read_bytes()
    for position in (0, 40, 200, len(whole) - 20):
        path.write_bytes(whole[:position] + bytes(20) + whole[position + 20 :])
        try:
            load_state({"model": new_engine()}, state)
        except ValueError as error:
            assert "\n" not in str(error) and str(state.folder) in str(error)
    path.write_bytes(b"")
    one_line(state.folder, lambda: load_state({"model": new_engine()}, state))
    torch.save({"module": {}}, path)
    one_line(state.folder, lambda: load_state({"model": new_engine()}, state))


def test_a_damaged_older_checkpoint_does_not_stop_saving(new_engine, tmp_path):
    engines = {"model": new_engine()}
    save_state(engines, tmp_path, 1, {})
    marker = newest_state(tmp_path).folder / "state.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"files": [1]}))
    one_line(marker, lambda: newest_state(tmp_path), "files is")
    save_state(engines, tmp_path, 2, {})
    save_state(engines, tmp_path, 3, {})
    assert [path.name for path in sorted((tmp_path / "state").iterdir())] == ["step-00000002", "step-00000003"]


def test_a_run_of_other_options_than_an_object_is_one_line(ranks, tmp_path):
    for text in ("[]", "3", '"x"', "null"):
        (tmp_path / "config.json").write_text(text)
        one_line(tmp_path, lambda: open_run(tmp_path, {"a": 1}, True, 9), "holds no options")
