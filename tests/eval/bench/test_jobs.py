"""eval/bench/jobs.py: parts that fail or take too long cost only themselves, and results come back in pieces, whole or not at all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.jobs import PIECE, Runner, last_lines, unpack_results

import pytest

ROOT = Path(__file__).parents[3]


def runner(folder: Path, minutes: float = 1.0) -> Runner:
    (folder / "work").mkdir(parents=True, exist_ok=True)
    return Runner(folder, folder / "work", time.monotonic() + 60 * minutes, ROOT)


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
    run.save("weights", run.work / "weights")
    pieces = sorted(tmp_path.glob("weights.tar.*"))
    assert len(pieces) == 2 and all(piece.stat().st_size <= PIECE for piece in pieces)
    run.save("weights", run.work / "weights")
    assert sorted(tmp_path.glob("weights.tar.*")) == pieces
    unpack_results(tmp_path)
    assert (tmp_path / "weights" / "model.bin").read_bytes() == content


def results(folder: Path, size: int = PIECE + 1000) -> bytes:
    run, content = runner(folder), os.urandom(size)
    (run.work / "weights").mkdir()
    (run.work / "weights" / "model.bin").write_bytes(content)
    run.save("weights", run.work / "weights")
    return content


def missing(folder: Path) -> None:
    (folder / "weights.tar.00").unlink()


def cut(folder: Path) -> None:
    path = folder / "weights.tar.01"
    path.write_bytes(path.read_bytes()[:-700])


def changed(folder: Path) -> None:
    path = folder / "weights.tar.00"
    path.write_bytes(path.read_bytes()[:9000] + b"12345678" + path.read_bytes()[9008:])


def without_report(folder: Path) -> None:
    (folder / "report.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (missing, "lacks weights.tar.00: bring all pieces back"),
        (cut, "are not those that report.json names: copy them again"),
        (changed, "are not those that report.json names: copy them again"),
        (without_report, "its report.json is damaged"),
    ],
)
def test_damaged_results_are_named_and_leave_nothing(tmp_path, damage, words):
    results(tmp_path)
    damage(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=words):
        unpack_results(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_signal_ends_the_parts_and_is_in_the_report(tmp_path):
    program = f"""
import signal, sys, time
from pathlib import Path
from bench.jobs import Runner
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
out = Path({str(tmp_path)!r})
(out / "work").mkdir()
run = Runner(out, out / "work", time.monotonic() + 60, Path({str(ROOT)!r}))
run.run(50, nap=["-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'eval'}"}
    )
    log = tmp_path / "work/logs/nap.log"
    for _ in range(300):
        if log.exists() and log.read_text().strip():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert json.loads((tmp_path / "report.json").read_text())["parts"]["nap"]["status"] == "stopped"
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)
