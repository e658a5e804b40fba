"""Kill tiny runs with SIGKILL at random moments, resume each until it ends by itself, and compare it with an undisturbed one.

    python -m tests.faults.killed --kills 100 --out eval/results/killed.json

Every run is a fork of this process, which has imported everything: a start takes a fraction of a second, so that kills land in
the run. Of three kills one comes while a checkpoint is being written; of those of two ranks, half hit one rank alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import larp  # noqa: F401  (before torch: it sets how torch's threads wait)
from larp.engine.checkpoint import newest_state
from larp.engine.distributed import free_port
from larp.engine.signals import run_script
from larp.files import write_json
from tests.faults.jobs import Job, contents, difference, jobs, prepare

import deepspeed  # noqa: F401  (once, before the forks)
import torch

# A rank whose peer has gone ends by itself or is ended by its launcher, see larp.engine.launch.
_GRACE = 3.0
_LONGEST = 300.0


class Unequal(Exception):
    """A run that did not resume, or did not become what the undisturbed one is."""


# ------------------------------------------------------------------------------------------------------------ one process


def fork(work, log: Path) -> int:
    """Call `work` in a fork that leads its own process group, its output in `log`; return its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        # Here and there, so that the group exists whoever comes first: a kill may follow at once.
        with suppress(OSError):
            os.setpgid(pid, pid)
        return pid

    def in_group() -> None:
        with suppress(OSError):
            os.setpgid(0, 0)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        work()

    exit_after(in_group)


def exit_after(work: Callable[[], None]) -> NoReturn:
    """End a forked process with the status of `work`."""
    try:
        work()
        os._exit(0)
    except SystemExit as error:
        os._exit(error.code if isinstance(error.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def run(job: Job, out: Path, log: Path) -> int:
    """Start a job, or go on with it; return the process id of the leader of its group."""
    out.parent.mkdir(parents=True, exist_ok=True)
    ranks_file = out.parent / "ranks"
    ranks_file.unlink(missing_ok=True)

    def one(rank: int) -> None:
        if job.ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        steps = open(out.parent / f"steps-{rank}.jsonl", "a")  # noqa: SIM115 - until the end of the process

        def note(step: int, data: Any) -> None:
            steps.write(json.dumps([step, data]) + "\n")
            steps.flush()

        job.record(note)
        run_script(job.name, lambda: job.main(job.arguments(out)))

    def lead() -> None:
        size = str(job.ranks)
        os.environ |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(free_port())
        pids = []
        for rank in range(job.ranks):
            if not (pid := os.fork()):
                exit_after(partial(one, rank))
            pids.append(pid)
        ranks_file.with_suffix(".part").write_text(json.dumps(pids))
        ranks_file.with_suffix(".part").rename(ranks_file)
        _, status = os.waitpid(-os.getpgrp(), 0)
        statuses, began = [status], time.monotonic()
        while len(statuses) < job.ranks:
            pid, status = os.waitpid(-os.getpgrp(), os.WNOHANG)
            if pid:
                statuses.append(status)
            elif statuses[0] and time.monotonic() > began + _GRACE:
                os.killpg(os.getpgrp(), signal.SIGKILL)
            time.sleep(0.01)
        os._exit(1 if any(statuses) else 0)

    return fork((lambda: one(0)) if job.ranks == 1 else lead, log)


def ended(pid: int) -> int | None:
    """Return the status of a process that has ended (negative: by this signal), None while it runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def wait(pid: int, seconds: float = _LONGEST) -> int | None:
    """Wait for the end of a process for some seconds; return its status, None if it still runs."""
    until = time.monotonic() + seconds
    while (status := ended(pid)) is None and time.monotonic() < until:
        time.sleep(0.001)
    return status


def unfinished_save(out: Path) -> bool:
    """Whether the newest checkpoint folder has no marker: it is being written, or its writing was cut short."""
    folders = sorted((out / "state").glob("step-*"))
    return bool(folders) and not (folders[-1] / "state.json").exists()


# ------------------------------------------------------------------------------------------------------------------ kills


def kill(job: Job, pid: int, out: Path, seconds: float, rng: random.Random) -> dict[str, bool] | int:
    """Kill a run at a random moment of the next `seconds`, or in the next checkpoint that it writes.

    Returns whether a checkpoint was being written, and whether one rank alone was killed; the status of a run that ended before.
    """
    until = time.monotonic() + (_LONGEST if job.save_every and rng.random() < 1 / 3 else rng.uniform(0, seconds))
    saving = until > time.monotonic() + seconds
    # A folder that an earlier kill left is removed when the run saves at that step again.
    known = unfinished_save(out)
    while ended_before(pid) is None and time.monotonic() < until:
        if saving and unfinished_save(out) and not known:
            time.sleep(rng.uniform(0, 0.02))
            break
        known = known and unfinished_save(out)
        time.sleep(0.0005)
    if ended_before(pid) is not None:
        return wait(pid)
    ranks = out.parent / "ranks"
    if one_rank := job.ranks > 1 and rng.random() < 0.5 and ranks.is_file():
        os.kill(rng.choice(json.loads(ranks.read_text())), signal.SIGKILL)
    else:
        os.killpg(pid, signal.SIGKILL)
    if (status := wait(pid, 60)) is None:
        raise Unequal(f"{job.name}: a rank survives the other by a minute")
    # A rank that is killed in the last moment, after it has done its work, is none that counts.
    return status if status == 0 else {"in_save": unfinished_save(out) and not known, "one_rank": one_rank}


def ended_before(pid: int) -> int | None:
    """Return a process id if this process has ended, without reaping it."""
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return None if found is None else found.si_pid


def steps_of(folder: Path, ranks: int) -> dict[tuple[int, int], Any]:
    """Return what each step of each rank trained on. Raises Unequal if a step that was repeated trained on something else."""
    found: dict[tuple[int, int], Any] = {}
    for rank in range(ranks):
        path = folder / f"steps-{rank}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                step, data = json.loads(line)
            except ValueError:  # the line that a kill cut short
                continue
            if found.setdefault((rank, step), data) != data:
                raise Unequal(f"step {step} of rank {rank} was repeated with other data")
    return found


def check_lost(job: Job, folder: Path, out: Path) -> int:
    """Return how many steps a kill lost. Raises Unequal if these are more than one interval of saving."""
    if not job.save_every:
        return 0
    last = max((step + 1 for _, step in steps_of(folder, job.ranks)), default=0)
    state = newest_state(out)
    lost = last - (state.step if state else 0)
    if lost > job.save_every + 1:  # the step in progress
        raise Unequal(f"{job.name}: a kill at step {last} lost {lost} steps")
    return lost


def campaign(job: Job, folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill a job so many times, in as many runs as that takes; return the counts. Raises Unequal at the first difference."""
    whole = folder / "whole"
    began = time.monotonic()
    if (status := wait(run(job, whole / "run", folder / "log"))) != 0:
        raise Unequal(f"{job.name}: the undisturbed run ended with status {status}, see {folder / 'log'}")
    seconds, expected = time.monotonic() - began, contents(whole / "run")
    data = steps_of(whole, job.ranks)
    counts = dict.fromkeys(("kills", "in_save", "one_rank", "before_first_save", "runs", "equal", "most_steps_lost"), 0)
    while counts["kills"] < kills:
        cut, status = folder / f"cut-{counts['runs']}", None
        counts["runs"] += 1
        while status is None:
            pid = run(job, cut / "run", folder / "log")
            found = kill(job, pid, cut / "run", seconds, rng) if counts["kills"] < kills else wait(pid)
            if isinstance(found, dict):
                counts["kills"] += 1
                counts["in_save"] += found["in_save"]
                counts["one_rank"] += found["one_rank"]
                counts["before_first_save"] += bool(job.save_every) and newest_state(cut / "run") is None
                counts["most_steps_lost"] = max(counts["most_steps_lost"], check_lost(job, cut, cut / "run"))
            elif found != 0:
                raise Unequal(f"{job.name}: a resumed run ended with status {found}, see {folder / 'log'}")
            else:
                status = found
        if (where := difference(expected, contents(cut / "run"))) is not None:
            raise Unequal(f"{job.name}: {where} is not that of the undisturbed run, see {cut}")
        if steps_of(cut, job.ranks) != data:
            raise Unequal(f"{job.name}: its steps trained on other data, see {cut}")
        counts["equal"] += 1
        shutil.rmtree(cut)
        print(f"{job.name}: {counts}", flush=True)
    return counts | {"seconds_of_a_run": round(seconds, 1)}


# ---------------------------------------------------------------------------------------------------------------- program


class SlowFiles(SimpleHTTPRequestHandler):
    """Sends files in pieces, so that a kill can come between them."""

    def copyfile(self, source, outputfile) -> None:
        while piece := source.read(1 << 16):
            outputfile.write(piece)
            time.sleep(0.004)

    def log_message(self, *arguments) -> None:
        """Print nothing."""


def serve(folder: Path, port: int) -> None:
    """Serve the files of a folder, until the process is killed."""
    ThreadingHTTPServer(("127.0.0.1", port), partial(SlowFiles, directory=str(folder))).serve_forever()


def main(argv: list[str] | None = None) -> None:
    """Run the campaigns that the command line names, and write their counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills",
        type=int,
        default=20,
        help="of each training, half of them with two ranks, and of the rest (default: %(default)s)",
    )
    parser.add_argument("--jobs", nargs="+", metavar="NAME", help="by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file of the counts")
    arguments = parser.parse_args(argv)
    rng, found, began = random.Random(arguments.seed), {}, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="larp-killed-") as name:
        folder, port = Path(name), free_port()
        os.environ |= {"LARP_DATA": str(folder / "data"), "LARP_MLLM_HOME": str(folder / "home")}
        if wait(fork(lambda: prepare(folder), folder / "log")) != 0:
            raise Unequal((folder / "log").read_text())
        server = fork(lambda: serve(folder / "published", port), folder / "log")
        try:
            for job in jobs(folder, f"http://127.0.0.1:{port}").values():
                if job.name in (arguments.jobs or [job.name]):
                    (folder / job.name).mkdir()
                    try:
                        found[job.name] = campaign(job, folder / job.name, arguments.kills // job.share, rng)
                    except Unequal:
                        shutil.copytree(folder / job.name, Path(tempfile.mkdtemp(prefix="larp-unequal-")) / job.name)
                        raise
                    minutes = round((time.monotonic() - began) / 60, 1)
                    result = {"seed": arguments.seed, "minutes": minutes, "torch": torch.__version__, "jobs": found}
                    if arguments.out is not None:
                        write_json(arguments.out, result)
        finally:
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
