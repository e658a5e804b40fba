"""How a script ends: exit status and message, and SIGTERM, SIGHUP, Ctrl-C and a dead launcher as a flag that trainers poll.

SIGTERM to the `deepspeed` runner kills only the runner, not its launcher process or the ranks. Each rank therefore
watches the processes that started it and treats the end of one of them like SIGTERM.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from larp.files import FULL, error_line

_POLL_SECONDS = 1.0
_GRACE_SECONDS = 300.0

_requested = threading.Event()
_stopped_by = int(signal.SIGTERM)
_stop_watching: threading.Event | None = None
_old_handlers: dict[int, Any] = {}


def run_script(prog: str, main: Callable[[], Any]) -> None:
    """Run a script's `main`; report errors that the user can fix in one message, with exit status 2 and no traceback.

    These are ValueError, OSError with a file name or of a full disk, and FloatingPointError (a loss that is not finite). A rank that only
    repeats an error of the main rank prints nothing. If the result has a key `stopped_at`, because the run was asked to
    stop, the exit status is 143 after SIGTERM, 129 after SIGHUP and 130 after Ctrl-C, so that later commands do not run.
    """
    plain_output()
    try:
        try:
            result = main()
        finally:
            flush_output()
    except BrokenPipeError:
        sys.exit(141)
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, OSError) and error.filename is None and error.errno not in FULL:
            raise
        if not getattr(error, "reported", False):
            print(f"{prog}: {error_line(error)}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "closed by peer" not in str(error):
            raise
        print(f"{prog}: rank {os.environ.get('RANK')} ends because another one did", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as stop:
        print(f"{prog}: interrupted", file=sys.stderr)
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
    if isinstance(result, dict) and "stopped_at" in result:
        sys.exit(128 + _stopped_by)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Everything is written. Skipping the interpreter's shutdown avoids rare aborts in communication threads whose
        # peers have exited, which a launcher would report as a failed training.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def plain_output() -> None:
    """Print what the terminal's encoding lacks, such as parts of file names that are not UTF-8, as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_output() -> None:
    """Flush the output while an error can still be reported. Raises ValueError for a full disk, BrokenPipeError as it is."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # At exit Python flushes again and would report the error a second time.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise ValueError(
            f"the output cannot be written ({error.strerror}): free space, or send it elsewhere"
        ) from error


def stop_signals() -> tuple[int, ...]:
    """Return the signals that ask for an end: SIGTERM, and SIGHUP unless it is ignored, as under nohup."""
    hangup = getattr(signal, "SIGHUP", None)
    ignored = hangup is None or signal.getsignal(hangup) == signal.SIG_IGN
    return (signal.SIGTERM,) if ignored else (signal.SIGTERM, hangup)


def stop_flag() -> bool:
    """Whether this process got SIGTERM, SIGHUP or Ctrl-C, or lost its launcher; see backend.stop_requested for all ranks."""
    return _requested.is_set()


def stopped_by() -> int:
    """Return the number of the signal that set `stop_flag`; SIGTERM before one has come."""
    return _stopped_by


def check_stop() -> None:
    """Raise KeyboardInterrupt, with the number of the signal, if `stop_flag` is set: for long work that trainers do not step through."""
    if _requested.is_set():
        raise KeyboardInterrupt(_stopped_by)


def install_handlers() -> None:
    """Record SIGTERM, SIGHUP unless it is ignored, and the first Ctrl-C in `stop_flag` instead of exiting.

    Does nothing outside the main thread, where Python allows no signal handlers.
    """
    global _stopped_by
    _requested.clear()
    _stopped_by = int(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread():
        for number in (*stop_signals(), signal.SIGINT):
            _old_handlers[number] = signal.signal(number, _handle)


def watch_launcher() -> None:
    """Start a thread that raises SIGTERM in this process when its launcher ends, and SIGKILL 300 s later."""
    global _stop_watching
    _stop_watching = threading.Event()
    arguments = (launcher_chain(), _stop_watching)
    threading.Thread(target=_watch, args=arguments, name="launcher-watch", daemon=True).start()


def restore_handlers() -> None:
    """Restore the previous signal handlers and stop watching the launcher."""
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
    """Return the process ids of the launcher: the parent and, for deepspeed's launch.py, its parent, the runner."""
    parent = os.getppid()
    if "deepspeed.launcher.launch" not in _command_line(parent):
        return (parent,)
    runner = _parent_of(parent)
    # On other machines ssh or pdsh starts launch.py, so that only the parent can be watched.
    return (parent, runner) if "deepspeed" in _command_line(runner) else (parent,)


def _handle(signum: int, frame: FrameType | None) -> None:
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
    """Return the parent's process id; 0 if the process has ended or there is no /proc."""
    try:
        # The command name in parentheses may contain spaces; state and parent follow the last parenthesis.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0
