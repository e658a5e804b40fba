"""SIGTERM and Ctrl-C become a flag that a trainer polls, and a rank whose launcher has died stops too instead of running on.

SIGTERM to the `deepspeed` runner kills the runner only: neither its launcher process nor the ranks learn of it. So a
rank watches the chain of processes that started it, and treats a break in the chain like SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

_POLL_SECONDS = 1.0
_GRACE_SECONDS = 300.0

_requested = threading.Event()
_stopped_by = int(signal.SIGTERM)
_stop_watching: threading.Event | None = None
_old_handlers: dict[int, Any] = {}


def stop_flag() -> bool:
    """True once this process got SIGTERM or Ctrl-C, or lost its launcher. One rank's view: see backend.stop_requested
    for all ranks'.
    """
    return _requested.is_set()


def stopped_by() -> int:
    """The signal that asked the last run of this process to stop: SIGINT for Ctrl-C, else SIGTERM."""
    return _stopped_by


def watch_launcher() -> None:
    """Raise SIGTERM in this process when a process of its launcher's chain ends, SIGKILL if it is there 300 s later."""
    global _stop_watching
    _stop_watching = threading.Event()
    arguments = (launcher_chain(), _stop_watching)
    threading.Thread(target=_watch, args=arguments, name="launcher-watch", daemon=True).start()


def note_signals() -> None:
    """Note SIGTERM and the first Ctrl-C instead of dying from them. Does nothing outside the main thread, where Python
    allows no handlers.
    """
    global _stopped_by
    _requested.clear()
    _stopped_by = int(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            _old_handlers[number] = signal.signal(number, _note)


def restore() -> None:
    """Give the signals back to whoever had them, and end the watch."""
    global _stop_watching
    if _stop_watching is not None:
        _stop_watching.set()
        _stop_watching = None
    if threading.current_thread() is threading.main_thread():
        for number, handler in _old_handlers.items():
            signal.signal(number, handler)
        _old_handlers.clear()
    _requested.clear()


def launcher_chain() -> tuple[int, ...]:
    """Process ids of the launcher: this process's parent and, for deepspeed's launch.py, the runner above it."""
    parent = os.getppid()
    if "deepspeed.launcher.launch" not in _command_line(parent):
        return (parent,)
    runner = _parent_of(parent)
    # ssh and pdsh start launch.py on other machines: there only the parent says anything.
    return (parent, runner) if "deepspeed" in _command_line(runner) else (parent,)


def _note(signum: int, frame: FrameType | None) -> None:
    global _stopped_by
    if signum == signal.SIGINT:
        if _requested.is_set():
            raise KeyboardInterrupt
        os.write(2, b"\nstopping after the next steps, and saving; Ctrl-C again stops at once\n")
    _stopped_by = signum
    _requested.set()


def _watch(chain: tuple[int, ...], stop: threading.Event) -> None:
    while not stop.wait(_POLL_SECONDS):
        if os.getppid() != chain[0] or (len(chain) > 1 and _parent_of(chain[0]) != chain[1]):
            os.kill(os.getpid(), signal.SIGTERM)
            if not stop.wait(_GRACE_SECONDS):
                os.kill(os.getpid(), signal.SIGKILL)
            return


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _parent_of(pid: int) -> int:
    """The parent's process id, 0 if the process is gone (or on a system without /proc)."""
    try:
        # The command name in parentheses may hold spaces; the state and the parent follow its last parenthesis.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def run_script(prog: str, main: Callable[[], Any]) -> None:
    """Run a script's `main`; what the user can mend ends it with one message and exit status 2, no traceback.

    That is a ValueError, an OSError that names a file (one that cannot be written, say), or a FloatingPointError: a loss
    that is no number any more. Of several ranks, those that merely repeat an error of the main one say nothing. A training
    run that was told to stop, and returns where in `stopped_at`, ends with 143 (as SIGTERM does) or 130 (as Ctrl-C does), so
    that what follows it does not start.
    """
    try:
        result = main()
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise
        if not getattr(error, "of_main", False):
            print(f"{prog}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        sys.exit(130)
    if isinstance(result, dict) and "stopped_at" in result:
        sys.exit(128 + stopped_by())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # All is written. Leaving at once spares the interpreter's long goodbye, in which communication threads whose peers are
        # gone abort now and then (seen once in a dozen runs), and a launcher takes that for a failed training.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
