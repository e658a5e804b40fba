"""The processes of a training on a CPU: a small model keeps two processes of one thread busy, but not two threads.

A script calls `spread`, which replaces it by this module. That starts the script again in several processes, as `torchrun` would,
but gives the ranks the time to save when they are asked to stop, and adds nothing to their messages.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from larp.engine import signals

if TYPE_CHECKING:
    from larp.engine.settings import EngineConfig

_POLL_SECONDS = 0.1
# After the failure of a rank, the time in which the others may end by themselves: one of them may have the message.
_GRACE_SECONDS = 3.0
_STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGHUP)


def spread(config: EngineConfig, batch_size: int) -> None:
    """Start the running script again in `config.processes` processes, and do not return; return where one is enough.

    That is under a launcher that has started several, with "auto" on a machine with a GPU, and where "auto" finds no other number
    of processes, up to the number of cores, among which the batch can be divided. Raises ValueError for a number of processes
    among which the batch cannot be divided, or with a GPU.
    """
    # On use, so that the module is small where it only waits for the ranks.
    from larp.engine.distributed import free_port
    from larp.kernels.allocator import with_huge_pages
    from larp.kernels.threads import cores

    count = count_processes(config, batch_size)
    if count == 1:
        return
    environment = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": str(max(1, cores() // count)),
    }
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-m", __name__, *sys.argv], with_huge_pages(os.environ | environment))


def count_processes(config: EngineConfig, batch_size: int) -> int:
    """Return the number of processes that `spread` starts; 1 for none."""
    from larp.engine.distributed import Ranks
    from larp.engine.settings import micro_batch
    from larp.kernels.threads import cores

    import torch

    if config.processes == 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return 1
    on_gpu = torch.accelerator.is_available()
    if config.processes != "auto":
        if on_gpu:
            raise ValueError(
                f"engine.processes is {config.processes}, which is for CPUs, and this machine has a GPU: leave it out, and "
                "start with `deepspeed --num_accelerators`"
            )
        micro_batch(batch_size, config.accumulation, Ranks(world_size=config.processes))
        return config.processes
    fitting = [n for n in range(1, cores() + 1) if batch_size % (n * config.accumulation) == 0]
    return 1 if on_gpu or not fitting else fitting[-1]


def main(command: Sequence[str]) -> int:
    """Run a script, given with its options, in WORLD_SIZE processes; return the exit status that a single one would have.

    SIGTERM, SIGHUP, Ctrl-C and the end of the launcher are passed on as SIGTERM, once; a second Ctrl-C ends the ranks at once.
    """
    name = Path(command[0]).name
    signals.install_handlers()
    if "RANK" in os.environ:
        signals.watch_launcher()
    ranks = [_start(rank, command) for rank in range(int(os.environ["WORLD_SIZE"]))]
    try:
        _wait(ranks)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return _status(ranks, name)


def _start(rank: int, command: Sequence[str]) -> subprocess.Popen:
    environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    # In a process group of its own, since a terminal sends Ctrl-C to the whole group of this process.
    return subprocess.Popen([sys.executable, *command], env=environment, process_group=0)


def _wait(ranks: list[subprocess.Popen]) -> None:
    """Wait for the end of all ranks, or until some time after the first failure."""
    told, failed_at = False, None
    while any([rank.poll() is None for rank in ranks]):  # a list: each is polled
        if signals.stop_flag() and not told:
            told = True
            for rank in ranks:
                rank.terminate()
        if failed_at is None and _failures(ranks):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() > failed_at + _GRACE_SECONDS:
            return
        time.sleep(_POLL_SECONDS)


def _failures(ranks: list[subprocess.Popen]) -> list[int]:
    return [rank.returncode for rank in ranks if rank.returncode not in (None, 0, *_STOPPED)]


def _status(ranks: list[subprocess.Popen], name: str) -> int:
    statuses = [rank.returncode for rank in ranks]
    # A rank that was still running when another failed was killed above, and is no cause.
    failed = [status for status in statuses if status not in (0, *_STOPPED)]
    cause = next((status for status in failed if status > 0), failed[0] if failed else 0)
    if cause < 0:
        print(
            f"{name}: a process was ended by signal {-cause}; the same command with --resume goes on", file=sys.stderr
        )
        return 128 - cause
    if cause == 0 and any(status in _STOPPED for status in statuses):
        return 128 + signals.stopped_by() if signals.stop_flag() else max(statuses)
    return cause


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
