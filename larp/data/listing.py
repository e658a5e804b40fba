"""What a data spec gives, a list of videos, and what the readers of all kinds of data share."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from larp.data.video import VIDEO_SUFFIXES

Split = Literal["train", "validation", "test", "all"]


class DataError(ValueError):
    """A data spec, folder or manifest that cannot be used; the message says where and what to do."""


class NoSplitError(DataError):
    """Data that are in order, but have no such split."""


@dataclass(frozen=True)
class VideoItem:
    """One video file: where it lies, its unique name within the set, its class index and its caption (None: none).

    group: what other videos of one scene have in common, split: where a manifest puts it; None where that is not known.
    """

    path: Path
    name: str
    label: int | None = None
    caption: str | None = None
    group: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class VideoSet:
    """The videos that a spec names; `classes[item.label]` is an item's class, and `notes` are lines for the user."""

    items: tuple[VideoItem, ...]
    classes: tuple[str, ...]
    spec: str
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    """Names of videos that a list or manifest has, but of which there is no file."""
    published: tuple[int, int] | None = None
    """Videos of this split, and classes, that the published data set has; None for other data."""

    def __len__(self) -> int:
        return len(self.items)


def humanize(class_name: str) -> str:
    """Turn a class name into words: "BasketballDunk" -> "basketball dunk"; the caption of videos without one."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[_\-]+", " ", class_name)
    return " ".join(words.lower().split())


def spoken(label: str | None) -> str | None:
    """Return the caption of a label: its words, or None if it is a number or absent."""
    return None if label is None or label.isdecimal() else humanize(label)


def ordered_classes(labels: Iterable[str | None]) -> tuple[str, ...]:
    """Return the class names among labels in the order of their indices: by number if all are numbers, else by name."""
    names = set(labels) - {None}
    return tuple(sorted(names, key=int if all(name.isdecimal() for name in names) else None))


def no_split(spec: str, split: Split, there: str) -> NoSplitError:
    """Return the error that names the splits which are there, such as "train and test"."""
    return NoSplitError(f"{spec}: has no {split} split; choose {there}, or all")


def as_folder(root: str, spec: str) -> Path:
    """Return the folder of a path; DataError if there is none."""
    path = Path(root).expanduser()
    if not root or not path.is_dir():
        raise DataError(
            f"{spec}: there is no folder {root!r}" if root else f"{spec}: the path is missing after the colon"
        )
    return path


def as_file(path: str, spec: str) -> Path:
    """Return the regular file of a path; DataError if there is none. A pipe would be waited for, maybe for ever."""
    file = Path(path).expanduser()
    if not path:
        raise DataError(f"{spec}: the path is missing after the colon")
    if not file.is_file():
        raise DataError(
            f"{spec}: {path!r} is a folder, a pipe or a device: give the name of a file"
            if file.exists()
            else f"{spec}: there is no file {path!r}"
        )
    return file


def videos_below(folder: Path) -> list[Path]:
    """Return the video files below a folder by their suffixes, sorted within each folder; hidden ones are left out."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(root) / f for f in sorted(files) if os.path.splitext(f)[1].lower() in VIDEO_SUFFIXES and f[0] != "."
        ]
    return found


def text_lines(path: str | Path, spec: str) -> list[str]:
    """Return the lines of a manifest with their ends, cut at newlines only: its text may hold U+2028 and its like.

    Raises DataError for a file that is absent or is not UTF-8.
    """
    try:
        with open(as_file(str(path), spec), encoding="utf-8-sig", newline="") as file:
            return list(file)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None


def csv_rows(path: str | Path, lines: list[str]) -> tuple[list[str], list[tuple[int, dict]]]:
    """Parse CSV lines with a header: the column names, and (line number, row) pairs. Raises DataError."""
    rows = csv.DictReader(lines)
    try:
        return list(rows.fieldnames or ()), [(rows.line_num, row) for row in rows]
    except csv.Error as error:
        where = f"{path}, line {rows.reader.line_num}"
        raise DataError(f"{where}: broken CSV: {error}; is a quote left open there or above?") from None


def cell(value: object, where: str) -> str | None:
    """Return a value of a manifest as stripped text, None if empty; DataError unless it is text or a number."""
    if value is not None and type(value) not in (str, int, float):
        raise DataError(f"{where} must be text or a number, not {json.dumps(value, ensure_ascii=False)[:80]}")
    text = "" if value is None else str(value).strip()
    return text or None


def hash_split(items: Iterable[VideoItem], split: Split, spec: str) -> tuple[VideoItem, ...]:
    """Put about one video in ten into test by a hash of its name, so that a growing folder moves no test video."""
    items = tuple(items)
    if split == "all":
        return items
    if split == "validation":
        raise no_split(spec, split, "train, test")
    order = {item.name: int(hashlib.sha256(item.name.encode()).hexdigest()[:8], 16) for item in items}
    test = {name for name, value in order.items() if value % 10 == 0}
    # a handful of videos may hash to one side only; each split then still gets one
    if len(items) > 1 and not test:
        test = {min(order, key=order.get)}
    if len(items) > 1 and len(test) == len(items):
        test.remove(max(order, key=order.get))
    chosen = tuple(item for item in items if (item.name in test) == (split == "test"))
    if not chosen:
        raise NoSplitError(f"{spec}: one video cannot be split into train and test; add videos, or use split all")
    return chosen
