"""Files that are written whole or not at all, and what is asked before: can it be written there?"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any


def write_json(path: Path | str, obj: Any) -> None:
    """Write `obj` as indented JSON such that after a crash the file holds the old or the new content, never a half.

    Numbers that are not finite become null: JSON has none, and other programs would refuse the whole file.
    """
    write_text(path, json.dumps(_finite(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(obj: Any) -> Any:
    if isinstance(obj, dict):
        return {key: _finite(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_finite(value) for value in obj]
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj


def write_text(path: Path | str, text: str) -> None:
    """Replace a UTF-8 file at once: written beside it, synced to disk, then renamed."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def check_writable(path: Path) -> None:
    """ValueError unless a file can be written to `path`, missing folders made; nothing stays behind from the check.

    An existing file counts as writable: it is replaced. For use before long work whose result goes there.
    """

    check_output(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file, such as {path / 'NAME'}")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written ({folder} is a file, not a folder): choose another place")
    try:
        # Tried, not asked: of /proc or a read-only disk the permissions tell another story.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({folder} takes no files: {error.strerror}): choose another place"
        ) from error


def as_url(path: str | Path) -> str | None:
    """The URL that a name is, with the second slash that pathlib takes away; None for the name of a file."""
    # A single letter before the colon is a drive.
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+", str(path))
    return f"{found[1]}://{str(path)[found.end() :]}" if found else None


def check_output(path: str | Path) -> None:
    """ValueError for what no file can be called, and for a URL, of which a folder would be made."""
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r} holds a zero byte: give the name of a file")
    if (url := as_url(path)) and not Path(path).parent.is_dir():
        raise ValueError(f"{url}: URLs are not written to: give the name of a file")
