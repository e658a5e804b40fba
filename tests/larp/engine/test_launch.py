"""Processes of a training on a CPU: how many, what is passed on to them, and how they end; automatic precision."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from larp.engine.launch import count_processes, spread
from larp.engine.settings import EngineConfig
from larp.kernels.allocator import with_huge_pages

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# Each rank counts the SIGTERMs that it gets, and stops as a training does. Each line is one write, since both write to one pipe.
RANK = """
import os, signal, sys, time
def say(*words): os.write(1, (" ".join(map(str, words)) + "\\n").encode())
rank, told = os.environ["RANK"], []
signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
say("rank", rank, "of", os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"], sys.argv[1:])
open(f"{sys.argv[1]}/started-{rank}", "w").write(str(os.getpid()))
end = time.monotonic() + 60
while time.monotonic() < end and not told:
    time.sleep(0.05)
time.sleep(0.5)
say("told", len(told))
sys.exit(143 if told else 1)
"""


@pytest.fixture
def cores(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("larp.kernels.threads.cores", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("processes", "batch", "accumulation", "count"),
    [(1, 16, 1, 1), ("auto", 16, 1, 4), ("auto", 6, 1, 3), ("auto", 7, 1, 1), ("auto", 16, 8, 2), (8, 16, 2, 8)],
)
def test_auto_is_the_largest_divisor_of_the_batch(cores, processes, batch, accumulation, count):
    assert count_processes(EngineConfig(processes=processes, accumulation=accumulation), batch) == count


def test_a_batch_that_cannot_be_divided_is_refused(cores):
    with pytest.raises(ValueError, match="multiple of 3"):
        count_processes(EngineConfig(processes=3), 16)
    with pytest.raises(ValueError, match="processes is 0"):
        EngineConfig(processes=0)


def test_ranks_of_a_launcher_start_none(cores, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert count_processes(EngineConfig(processes="auto"), 16) == 1
    # deepspeed starts one process on a CPU unless it is told otherwise.
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert count_processes(EngineConfig(processes="auto"), 16) == 4


def test_a_gpu_is_left_to_launchers(cores, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert count_processes(EngineConfig(processes="auto"), 16) == 1
    with pytest.raises(ValueError, match="num_accelerators"):
        count_processes(EngineConfig(processes=2), 16)


@pytest.mark.parametrize("own", [None, "glibc.malloc.hugetlb=0:glibc.malloc.check=1"])
def test_ranks_ask_for_huge_pages_unless_the_user_decides(cores, monkeypatch, own):
    seen = {}
    monkeypatch.setattr(os, "execve", lambda path, command, environment: seen.update(environment))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if own:
        monkeypatch.setenv("GLIBC_TUNABLES", own)
    spread(EngineConfig(processes="auto"), 16)
    assert seen["WORLD_SIZE"] == "4" and seen["GLIBC_TUNABLES"] == ":".join(
        filter(None, ["glibc.malloc.hugetlb=1", own])
    )


@pytest.mark.skipif(
    sys.platform != "linux" or not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(),
    reason="the kernel does not take requests for huge pages",
)
def test_memory_of_a_rank_may_lie_on_huge_pages():
    # VmFlags `hg`: the process has asked for huge pages there.
    code = (
        "import re; from larp.kernels.allocator import keep_freed_memory; keep_freed_memory(); kept = bytearray(1 << 26); "
        "heap = open('/proc/self/smaps').read().partition('[heap]')[2]; print(' hg' in re.search('VmFlags:.*', heap)[0])"
    )
    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | {"PYTHONPATH": str(ROOT)}
    for environment, asked in ((plain, "False"), (with_huge_pages(plain), "True")):
        found = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == asked


@pytest.mark.parametrize(("native", "on_gpu", "precision"), [(1, 0, "bf16"), (0, 0, "fp32"), (1, 1, "fp32")])
def test_automatic_precision_is_that_of_the_processor(monkeypatch, native, on_gpu, precision):
    monkeypatch.setattr("larp.engine.settings.multiplies_bf16", lambda: bool(native))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: bool(on_gpu))
    assert EngineConfig(precision="auto").precision == precision


def start(folder, script):
    (folder / "script.py").write_text(script)
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    environment |= {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "larp.engine.launch", folder / "script.py", folder]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, preexec_fn=as_from_a_terminal, **pipes)


def as_from_a_terminal():
    """Take back what `nohup make test` or a job in the background ignores, and its children with it."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.05)
    return condition()


def started(folder):
    return all((folder / f"started-{rank}").exists() and (folder / f"started-{rank}").read_text() for rank in (0, 1))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_reaches_each_rank_once(tmp_path, number, status):
    with start(tmp_path, RANK) as launcher:
        assert wait_for(lambda: started(tmp_path))
        launcher.send_signal(number)
        out, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == status
    assert out.count("told 1") == 2 and f"rank 1 of 2 1 [{str(tmp_path)!r}]" in out


def test_a_second_interruption_ends_the_ranks_at_once(tmp_path):
    with start(tmp_path, RANK.replace("and not told", "").replace("0.5", "60")) as launcher:
        assert wait_for(lambda: started(tmp_path))
        launcher.send_signal(signal.SIGINT)
        time.sleep(0.5)
        launcher.send_signal(signal.SIGINT)
        _, errors = launcher.communicate(timeout=30)
    assert launcher.returncode == 130 and "script.py: interrupted" in errors
    assert not any(Path(f"/proc/{(tmp_path / f'started-{rank}').read_text()}").exists() for rank in (0, 1))


def test_the_failure_of_one_ends_the_others_with_its_status(tmp_path):
    failing = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit('no such data')\ntime.sleep(60)"
    with start(tmp_path, failing) as launcher:
        _, errors = launcher.communicate(timeout=30)
    assert launcher.returncode == 1 and errors == "no such data\n"


def test_a_message_of_another_rank_is_waited_for(tmp_path):
    late = "import os, sys, time\nif os.environ['RANK'] == '0': time.sleep(0.5); print('why', file=sys.stderr)\nsys.exit(2)"
    with start(tmp_path, late) as launcher:
        _, errors = launcher.communicate(timeout=30)
    assert launcher.returncode == 2 and errors == "why\n"


def test_a_killed_rank_is_named(tmp_path):
    with start(tmp_path, RANK) as launcher:
        assert wait_for(lambda: started(tmp_path))
        os.kill(int((tmp_path / "started-1").read_text()), signal.SIGKILL)
        _, errors = launcher.communicate(timeout=30)
    assert launcher.returncode == 137 and "ended by signal 9" in errors and "--resume" in errors


def test_success(tmp_path):
    with start(tmp_path, "") as launcher:
        assert launcher.communicate(timeout=30) == ("", "") and launcher.returncode == 0


def test_the_waiting_process_imports_no_torch(tmp_path):
    code = "import sys, larp.engine.launch; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
