"""JSON and text files written atomically, and checks of output paths before long work."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any


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
    """Write a UTF-8 file atomically: into a temporary file, synced to disk, then renamed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def check_writable(path: Path) -> None:
    """Raise ValueError unless the file `path` can be written, missing folders created; the check leaves nothing behind.

    An existing file counts as writable, since it is replaced. Call this before long work whose result goes to `path`.
    """
    check_output(path)
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
