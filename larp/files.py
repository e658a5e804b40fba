"""Files written atomically, paths of the user, and checks of output paths before long work."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import math
import os
import re
import secrets
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the system's errors for a full disk."""


def read_json(path: Path | str, remedy: str = "copy it again") -> Any:
    """Read a UTF-8 JSON file. Raises ValueError, which ends with `remedy`, if the content is not valid JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # also of text that is not UTF-8
        raise ValueError(f"{path} is not valid JSON ({error}): {remedy}") from error


def write_json(path: Path | str, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically: after a crash the file has either its old or its new content.

    NaN and infinity become null, because JSON has neither.
    """
    write_text(path, json.dumps(_finite(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 file atomically and synced to disk. File names that are not UTF-8 are written with escapes, as in JSON."""
    with replacing(path, sync=True) as part:
        part.write_bytes(text.encode("utf-8", errors="backslashreplace"))


@contextmanager
def replacing(path: Path | str, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path, whose file replaces `path` after the block. After an error `path` is as it was before.

    The file has the permissions that the umask gives to new files. Of several programs that write `path`, the last one wins,
    and none sees the file of another. Missing folders are created.

    Args:
        path: the file to write. The temporary file has the same suffix and lies in a folder beside it.
        sync: write the file to disk before it gets its name.

    Raises OSError with the name of `path` if it cannot be written.
    """
    path = Path(path)
    # Absolute: FFmpeg takes "take:/a.mp4" for a protocol. In a folder of its own: safetensors writes to a file beside the one
    # that it is told, which a killed program would leave there.
    folder = path.absolute().with_name(_temporary_name())
    part = folder / f"part{path.suffix[:16]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.absolute().parent)
        folder.mkdir()
        part.touch()
        mode = part.stat().st_mode
        yield part
        # safetensors makes files that only their owner can read.
        set_mode(part, mode)
        if sync:
            with open(part, "rb") as file:
                os.fsync(file.fileno())
        os.replace(part, path)
    except Exception as error:
        number = error_number(error)
        elsewhere = isinstance(error, OSError) and error.filename and not str(error.filename).startswith(str(folder))
        if number is None or elsewhere:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def set_mode(path: Path, mode: int) -> None:
    """Set the permissions of a file, where its file system has any: SMB and FAT refuse."""
    if path.stat().st_mode & 0o777 != mode & 0o777:
        with suppress(OSError):
            path.chmod(mode & 0o777)


def obey_umask(folder: Path) -> None:
    """Give the weights below a folder the permissions of other new files; safetensors makes them for their owner alone."""
    probe = folder / f".mode-{secrets.token_hex(6)}"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*.safetensors"):
        set_mode(path, mode)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder, which takes the place of `folder` after the block. After an error `folder` is as it was before."""
    part, old = (folder.absolute().with_name(_temporary_name()) for _ in range(2))
    try:
        part.mkdir(parents=True)
        _remove_abandoned(part.parent)
        yield part
        obey_umask(part)
        if not _exchange(part, folder):
            with suppress(FileNotFoundError):
                os.replace(folder, old)
            os.replace(part, folder)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        for path in (part, old):
            shutil.rmtree(path, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders at once, so that a kill finds either; False where `other` is missing or the system cannot do it."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):  # of Linux, with glibc 2.28 or musl 1.2.6
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(one), here, os.fsencode(other.absolute()), exchange) == 0


def _temporary_name() -> str:
    """Return a name that no other program takes; it tells by whom it was taken."""
    return f"{_own_prefix()}{os.getpid()}-{secrets.token_hex(6)}"


def _own_prefix() -> str:
    return f".writing-{zlib.crc32(os.uname().nodename.encode()):08x}-"


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files and folders of programs of this machine that were killed."""
    prefix = _own_prefix()
    for entry in [entry for entry in os.scandir(folder) if entry.name.startswith(prefix)]:
        try:
            os.kill(int(entry.name[len(prefix) :].partition("-")[0]), 0)
        except (ProcessLookupError, ValueError):
            with suppress(OSError):
                shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
        except OSError:  # it runs, as another user
            continue


def error_number(error: Exception) -> int | None:
    """Return the number of the system's error in an exception, None if it has another cause."""
    if isinstance(error, OSError):
        return error.errno
    # safetensors has a class of its own, which is no OSError, and tokenizers raises a bare Exception.
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return int(found[1])
    # torch.save, which hides the reason.
    return errno.ENOSPC if re.search(r"inline_container|iostream error", str(error)) else None


def error_line(error: BaseException) -> str:
    """Return the message of an error, with the remedy of a full disk."""
    full = isinstance(error, OSError) and error.errno in FULL
    return f"{error}; free space there, or choose another place" if full else str(error)


def user_path(path: Path | str) -> Path:
    """Return `path` with a leading ~ or ~USER as that home folder. Raises ValueError for ~ without a home folder."""
    return Path(user_text(os.fspath(path)))


def user_text(text: str) -> str:
    """Return what may be a path, a hub name or a data spec as it is, but for a leading ~ or ~USER, see `user_path`."""
    found = os.path.expanduser(text)
    if found == "~" or found.startswith("~/"):
        raise ValueError(f"{text}: this user has no home folder: give the whole path, or set HOME")
    return found


def cache_folder(variable: str, name: str = "larp") -> Path:
    """Return the folder that an environment variable names, by default ~/.cache/NAME.

    Without a home folder, or with that of another user, it is `temporary_folder` / NAME.
    """
    if given := os.environ.get(variable):
        return user_path(given)
    folder = Path(os.path.expanduser("~"), ".cache", name)
    try:
        readable = not folder.is_dir() or os.access(folder, os.X_OK)
    except PermissionError:
        readable = False
    return folder if folder.is_absolute() and readable else temporary_folder() / name


def temporary_folder() -> Path:
    """Return a folder of this user among the temporary files. Raises ValueError if it belongs to another user."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir(), f"larp-{user}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if folder.is_symlink() or (user != "user" and folder.stat().st_uid != user):
        raise ValueError(f"{folder} belongs to another user: set HOME, or TMPDIR to a folder of yours")
    return folder


def claim(names: Iterable[Path]) -> Path:
    """Make an empty file of the first name that no file has, and return it: no other program gets this name."""
    for path in names:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            continue
        return path
    raise ValueError("no name is left")


@contextmanager
def writing_alone(folder: Path) -> Iterator[None]:
    """Create a folder; in the block other programs are refused there. Raises ValueError if another one is in such a block."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise ValueError(
            f"another program writes to {folder} now: wait until it ends, or choose another folder"
        ) from error
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(handle)
        with suppress(OSError):  # nothing was written
            folder.rmdir()


def check_writable(path: Path) -> None:
    """Raise ValueError unless the file `path` can be written, missing folders created; the check leaves nothing behind.

    An existing file counts as writable, since it is replaced. Call this before long work whose result goes to `path`.
    """
    check_output(path)
    check_names(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file, such as {path / 'NAME'}")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written ({folder} is a file, not a folder): choose another place")
    try:
        # Permissions do not tell for /proc or a read-only disk, so a file is created.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({folder} takes no files: {error.strerror}): choose another place"
        ) from error


def check_names(path: Path) -> None:
    """Raise ValueError if a part of `path`, or all of it, is longer than its file system takes."""
    parts = [*reversed(path.absolute().parents), path.absolute()]
    folder = parts[0]
    for part in parts[1:]:
        try:
            most = os.pathconf(folder, "PC_NAME_MAX")
        except (OSError, ValueError, AttributeError):
            most = 255
        if (size := len(os.fsencode(part.name))) > most:
            raise ValueError(
                f"{part.name[:40]}... cannot be written: the name has {size} bytes, and {folder} takes {most}: give a shorter one"
            )
        if part.is_dir():
            folder = part
    # The room is for names of temporary files, and of those in a folder that is written.
    if (size := len(os.fsencode(path.absolute()))) > (most := 4096 - 256):
        raise ValueError(
            f"{str(path)[:40]}... cannot be written: the path has {size} bytes, more than {most}: give a shorter one"
        )


def check_output(path: str | Path) -> None:
    """Raise ValueError if `path` holds a zero byte or is a URL, for which a folder would be created."""
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r} holds a zero byte: give the name of a file")
    if (url := as_url(path)) and not Path(path).parent.is_dir():
        raise ValueError(f"{url}: URLs are not written to: give the name of a file")


def as_url(path: str | Path) -> str | None:
    """Return `path` as a URL, with the second slash that pathlib removes, or None if it names a file."""
    # A single letter before the colon is a drive.
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+", str(path))
    return f"{found[1]}://{str(path)[found.end() :]}" if found else None


def _finite(obj: Any) -> Any:
    if isinstance(obj, dict):
        return {key: _finite(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_finite(value) for value in obj]
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj
