"""Checkpoints of strangers, and damaged ones: no code is run, and every fault is one line that names the folder."""

import io
import json
import os
import pickle
import struct
import zipfile

from larp.engine.backend import EngineConfig
from larp.engine.checkpoint import load_state, newest_state, open_run, save_state
from larp.engine.untrusted import check_contents
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
        match = (
            rf"{path} holds more than tensors and numbers \(posix\.system\), which could run code: .*copy the run again"
        )
        one_line(state.folder, lambda: load_state({"model": other}, state) or state.extra, match)
        path.write_bytes(pickle.dumps(Code(f"touch {tmp_path}/ran")))
        one_line(state.folder, lambda: load_state({"model": other}, state) or state.extra)
        path.write_bytes(whole)
    assert not (tmp_path / "ran").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    load_state({"model": other}, state)


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def archive(pickled, method=zipfile.ZIP_STORED, **more):
    """The bytes of a file as torch.save writes it."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as file:
        for name, content in {"data.pkl": b"\x80\x02" + pickled + b".", "version": b"3", **more}.items():
            file.writestr(f"archive/{name}", content)
    return data.getvalue()


DOUBLED = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
FILLED_LATER = b"".join(b"h" + bytes([i]) + b"(" + 2 * (b"h" + bytes([i + 1])) + b"e" for i in range(60))
SYSTEM = text("touch ran") + b"\x85R"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (archive(named("posix", "system") + SYSTEM), r"\(posix\.system\)"),
        (archive(named("builtins", "eval") + SYSTEM), r"\(builtins\.eval\)"),
        (archive(named("functools", "partial") + named("os", "system") + b"\x85R"), r"\(functools\.partial\)"),
        (archive(named("numpy.core.multiarray", "scalar") + SYSTEM), r"\(numpy\.core\.multiarray\.scalar\)"),
        (archive(named("torch._tensor", "_rebuild_from_type_v2") + named("os", "system") + SYSTEM), r"\(os\.system\)"),
        (archive(named("torch.storage", "_load_from_bytes") + SYSTEM), r"\(torch\.storage\._load_from_bytes\)"),
        (archive(b"(" + text("touch ran") + b"ios\nsystem\n"), r"\(os\.system\)"),
        (archive(text("os") + text("system") + b"\x93" + SYSTEM), r"\(os\.system\)"),
        (archive(named("builtins", "bytearray") + b"\x8a\x05" + (1 << 36).to_bytes(5, "little") + b"\x85R"), "bytearray"),
        (archive(named("torch", "FloatTensor") + 2 * (b"J" + struct.pack("<i", 10**5)) + b"\x86R"), "FloatTensor"),
        (archive(b"})" + DOUBLED + b"K\x01s"), "contain each other too often"),
        (archive(b"]" + b"".join(b"q" + bytes([i]) + b"]q\x63(h\x63a" for i in range(9))), "damaged"),
        (
            archive(b"(" + b"".join(b"]q" + bytes([i]) for i in range(61)) + b"l(" + FILLED_LATER + b"l\x86"),
            "contain each other too often",
        ),
        (archive(b")" + b"\x85" * 20_000), "contain each other too often"),
        (archive(b"]q\x00h\x00a"), "contains itself"),
        (archive(b"}", zipfile.ZIP_DEFLATED, **{"data/0": bytes(1 << 26)}), "larger than the file"),
        (archive(b"}", **{"constants.pkl": b"}."}), "no file of torch.save"),
        (archive(b"}}"), "more than one value"),
        (b"\x80\x02}.", "not a zip file"),
    ],
)  # fmt: skip
def test_files_that_no_training_writes_are_not_built(tmp_path, content, said, monkeypatch):
    """Code, and what would fill the memory: values 2^60 times in each other, compressed parts, tensors larger than the file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "step/model").mkdir(parents=True)
    (tmp_path / "step/model/a.pt").write_bytes(content)
    one_line(tmp_path / "step/model/a.pt", lambda: check_contents(tmp_path / "step"), said)
    assert not (tmp_path / "ran").exists()


def test_tensors_larger_than_their_file_are_not_built(tmp_path):
    for tensor in (torch.zeros(1).expand(10**11), torch.empty(10**11, device="meta")):
        torch.save({"exp_avg": [tensor]}, tmp_path / "a.pt")
        one_line(tmp_path / "a.pt", lambda: check_contents(tmp_path), "tensors are larger than the file")
    own = torch.nn.Linear(64, 64)
    own.tied = own.weight
    torch.save(
        {"module": own.state_dict(), "size": own.weight.shape, "type": torch.bfloat16, "at": own.weight.device},
        tmp_path / "a.pt",
    )
    check_contents(tmp_path)


def test_an_optimizer_of_another_model_is_one_line(new_engine, train, tmp_path):
    own, other = new_engine(), new_engine()
    train(own, 0, 1)
    save_state({"model": own}, tmp_path, 1, {})
    state = newest_state(tmp_path)
    path = next((state.folder / "model").glob("*states.pt"))

    def first(content):
        return content["optimizer"]["state"][0]

    for change, said in (
        (lambda content: first(content).update(exp_avg=torch.zeros(3)), "exp_avg of the optimizer does not fit"),
        (lambda content: first(content).update(exp_avg="x"), "exp_avg of the optimizer does not fit"),
        (lambda content: first(content).pop("exp_avg_sq"), "exp_avg_sq of the optimizer does not fit"),
        (lambda content: first(content).update(step="x"), "could not convert"),
        (lambda content: content["optimizer"].update(state={}), "no state of the optimizer"),
        (lambda content: content["optimizer"]["param_groups"].pop(), "parameter groups|KeyError|IndexError"),
        (lambda content: content.update(global_steps="x"), "counters are no whole numbers"),
        (lambda content: content["larp"]["engine"].update(step_count=1.5), "counters are no whole numbers"),
    ):
        content = torch.load(path, weights_only=False)
        change(content)
        torch.save(content, path)
        one_line(state.folder, lambda: load_state({"model": other}, state), said)
        save_state({"model": own}, tmp_path, 1, {})


def test_a_checkpoint_with_a_pipe_is_not_waited_for(new_engine, tmp_path):
    save_state({"model": new_engine()}, tmp_path, 1, {})
    path = newest_state(tmp_path).folder / "extra.pt"
    path.unlink()
    os.mkfifo(path)
    marker = path.parent / "state.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"files": {"extra.pt": 0}}))
    assert newest_state(tmp_path) is None


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
