"""eval/gpu.py: parts that fail or take too long cost only themselves, results come back in pieces, and all of it runs without a GPU."""

import importlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from eval.gpu import PIECE, GpuConfig, Runner, last_lines, main, unpack_results
from larp.data.clip_pack import PackOptions, pack_clips
from larp.generator import LarpGenerator
from larp.tokenizer import LarpTokenizer
from larp_mllm.mllm import Mllm

import pytest

ROOT = Path(__file__).parents[2]


def runner(folder: Path, minutes: float = 1.0) -> Runner:
    config = GpuConfig(minutes=minutes, out=folder, device="cpu")
    (folder / "work").mkdir(parents=True, exist_ok=True)
    return Runner(config, time.monotonic() + 60 * minutes)


def test_a_part_that_fails_or_hangs_costs_only_itself(tmp_path):
    run = runner(tmp_path)
    assert run.run(20, good=["-c", "print('made')"])
    assert not run.run(20, bad=["-c", "print('working'); raise ValueError('no such thing')"])
    began = time.monotonic()
    assert not run.run(5, hangs=["-c", "import time; print('begun', flush=True); time.sleep(100)"])
    assert time.monotonic() - began < 15
    assert run.run(20, last=["-c", "pass"])
    parts = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert [part["status"] for part in parts.values()] == ["ok", "failed", "out of time", "ok"]
    assert "no such thing" in parts["bad"]["lines"] and "begun" in parts["hangs"]["lines"]
    assert "logs/good.log" in unpack_results(tmp_path) and (tmp_path / "logs/good.log").read_text() == "made\n"


def test_what_a_part_started_ends_with_it(tmp_path):
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print(p.pid, flush=True); p.wait()"
    run = runner(tmp_path)
    assert not run.run(5, parent=["-c", child])
    pid = int(last_lines(run.log("parent")))
    for _ in range(50):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    os.kill(pid, 9)
    pytest.fail("a grandchild lives on")


def test_parts_run_side_by_side_and_without_time_not_at_all(tmp_path):
    run, began = runner(tmp_path), time.monotonic()
    nap = ["-c", "import time; time.sleep(2)"]
    assert run.run(20, one=nap, two=nap)
    assert time.monotonic() - began < 3.8
    run.deadline = time.monotonic() + 1
    assert not run.run(20, late=nap)
    assert "give more --minutes" in run.report["parts"]["late"]["lines"]


def test_results_come_back_in_pieces_of_bounded_size(tmp_path):
    run = runner(tmp_path)
    content = os.urandom(PIECE + 1000)
    (run.work / "weights").mkdir()
    (run.work / "weights" / "model.bin").write_bytes(content)
    run.keep("weights", run.work / "weights")
    pieces = sorted(tmp_path.glob("weights.tar.*"))
    assert len(pieces) == 2 and all(piece.stat().st_size <= PIECE for piece in pieces)
    run.keep("weights", run.work / "weights")
    assert sorted(tmp_path.glob("weights.tar.*")) == pieces
    unpack_results(tmp_path)
    assert (tmp_path / "weights" / "model.bin").read_bytes() == content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda:7"], "device 'cuda:7' is not there; this machine has"),
        (["--device", "cpu"], "--pack names no packed clips to train on: make them with larp-mllm pack-clips"),
        (["--unpack-results", "{}"], "holds no results"),
        (["--wheels", "{}/none"], "none holds no wheel: make them with `make wheelhouse PYTHON=3.12`"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path, options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        main(["--out", str(tmp_path / "out"), *(option.format(tmp_path) for option in options)])


def test_wheels_are_there_before_the_command_line_is_read(tmp_path, monkeypatch):
    """As on a machine that lacks the package that reads it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "before")
    text = {
        "METADATA": "Metadata-Version: 2.1\nName: lacking\nVersion: 1\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n",
    }
    with zipfile.ZipFile(tmp_path / "lacking-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("lacking.py", "ANSWER = 42")
        for name, content in (*text.items(), ("RECORD", "")):
            wheel.writestr(f"lacking-1.dist-info/{name}", content)
    with pytest.raises(ValueError, match="holds no results"):
        main([f"--wheels={tmp_path}", "--unpack-results", str(tmp_path)])
    assert importlib.import_module("lacking").ANSWER == 42
    assert os.environ["PYTHONPATH"].split(os.pathsep)[1:] == ["before"]


def test_minutes_must_be_positive():
    with pytest.raises(ValueError, match="minutes = 0 must be positive"):
        GpuConfig(minutes=0)


def test_the_program_says_a_mistake_without_a_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "eval/gpu.py", "--device", "cpu", "--out", tmp_path / "out"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode != 0 and "Traceback" not in done.stderr and "--pack names no packed clips" in done.stderr


@pytest.mark.slow
def test_all_of_it_runs_without_a_gpu(clips_root, tmp_path):
    """The command that waits for a GPU, with tiny sizes: every part, from packed clips to files that come back."""
    rows = []
    for split, group in (("train", "g1"), ("validation", "g25"), ("test", "g0")):
        for name in ("Surfing", "Archery"):
            files = sorted((clips_root / "ucf101/UCF-101" / name).glob(f"v_{name}_{group}*.mp4"))[:4]
            rows += [{"path": str(path), "label": name, "split": split} for path in files]
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack_clips([f"jsonl:{manifest}"], tmp_path / "box.clips", PackOptions(max_frames=32))
    command = [sys.executable, ROOT / "eval/gpu.py", "--pack", tmp_path / "box.clips", "--out", tmp_path / "out"]
    done = subprocess.run(
        [*command, "--minutes", "4", "--device", "cpu", "--rehearse"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    report = json.loads((tmp_path / "out/report.json").read_text())
    bad = {name: part for name, part in report["parts"].items() if part["status"] != "ok"}
    assert done.returncode == 0 and not bad, (bad, done.stdout[-3000:], done.stderr[-3000:])
    assert {"tests", "speed", "unpack", "tokenizer", "tokens_train", "generator", "mllm"} <= set(report["parts"])
    pieces = list((tmp_path / "out").glob("*.tar.*"))
    assert all(piece.stat().st_size <= PIECE for piece in pieces)
    assert len(pieces) + len(list((tmp_path / "out").glob("*.json"))) <= 8
    unpack_results(tmp_path / "out")
    tokenizer = LarpTokenizer.from_pretrained(tmp_path / "out/weights/tokenizer")
    generator = LarpGenerator.from_pretrained(tmp_path / "out/weights/generator")
    assert generator.config.tokenizer_hash == tokenizer.weight_hash(), "what came back belongs together"
    (video,) = Mllm.load(tmp_path / "out/weights/mllm", "cpu").generate(["surfing"])
    assert video.frames.shape == (16, 64, 64, 3), "the language model writes with the tokenizer that came with it"
    assert (tmp_path / "out/speed.json").is_file() and (tmp_path / "out/reconstruction.json").is_file()
