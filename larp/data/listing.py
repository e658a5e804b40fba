"""The list of videos that a data spec yields, and helpers shared by the readers of all formats."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from larp.data.stored_video import StoredVideo
from larp.data.video import VIDEO_SUFFIXES
from larp.files import user_path

import torch
from torch import Tensor

Split = Literal["train", "validation", "test", "all"]


CAPTION_BREAK = "\x1e"
"""Separates the captions of one video: the record separator of ASCII, which no text holds."""


class DataError(ValueError):
    """A data spec, folder or manifest that cannot be used; the message states the place and the remedy."""


class NoSplitError(DataError):
    """Valid data without the requested split."""


@dataclass(frozen=True)
class VideoItem:
    """One video of a set."""

    path: Path | StoredVideo
    name: str
    """Unique within the set."""
    label: int | None = None
    """Class index; None without a class."""
    caption: str | None = None
    """Its caption, or several joined by `CAPTION_BREAK`, see `captions_of`; None without one."""
    group: str | None = None
    """Identifier shared by videos of one scene; None if unknown."""
    split: str | None = None
    """Split in the manifest; None if it has no splits."""


class StoredItems(Sequence[VideoItem]):
    """The videos of a set that may be too large for a tuple: each is made on access.

    Args:
        make: row of the store -> its video.
        rows: of the store, int64 (n,), ascending.
        fingerprint: of everything that the videos depend on, in place of their names and files.
        parts: number of rows of each part of the store, such as a shard; they sum to all rows.
    """

    def __init__(self, make: Callable[[int], VideoItem], rows: Tensor, fingerprint: str, parts: Sequence[int]):
        self._make, self._rows, self.fingerprint = make, rows, fingerprint
        ends = torch.searchsorted(rows, torch.tensor(parts, dtype=torch.int64).cumsum(0)).tolist()
        self.parts = [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
        """The videos of each part of the store."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(len(self))))
        return self._make(int(self._rows[index]))


@dataclass(frozen=True)
class VideoSet:
    """The videos of one split of a data spec."""

    items: Sequence[VideoItem]
    """A tuple, or `StoredItems`."""
    classes: tuple[str, ...]
    """Class names by label."""
    spec: str
    notes: tuple[str, ...] = ()
    """Messages for the user, one line each."""
    missing: tuple[str, ...] = ()
    """Names of listed videos without a file."""
    published: tuple[int, int] | None = None
    """Number of videos of this split, and of classes, in the published data set; None for other data."""

    def __len__(self) -> int:
        return len(self.items)


def of_classes(videos: VideoSet, names: Collection[str]) -> VideoSet:
    """Return the videos of the named classes, which are numbered anew in their order; the same set if it has no others."""
    classes = tuple(name for name in videos.classes if name in names)
    if classes == videos.classes:
        return videos
    number = {videos.classes.index(name): new for new, name in enumerate(classes)}
    items = tuple(replace(item, label=number[item.label]) for item in videos.items if item.label in number)
    return replace(videos, items=items, classes=classes, published=None)


def captions_of(caption: str | None) -> tuple[str, ...]:
    """Return the captions of a video, the first one first; none for None."""
    return () if caption is None else tuple(caption.split(CAPTION_BREAK))


def skipped_lines(skipped: Sequence[tuple[str, str]], most: int = 1000) -> list[str]:
    """Return lines that name videos that were skipped, (name, reason) each, at most so many, and how many more there are."""
    lines = [f"skipped {printable(name)}: {reason}" for name, reason in skipped[:most]]
    return lines + ([f"and {len(skipped) - most} more"] if len(skipped) > most else [])


def join_captions(texts: Iterable[str | None]) -> str | None:
    """Return captions as `VideoItem.caption` has them, each once, without those that are empty; None if none is left."""
    return CAPTION_BREAK.join(dict.fromkeys(text.strip() for text in texts if text and text.strip())) or None


def printable(name: str) -> str:
    """Return the name of a file in one line, with escapes for what cannot be printed."""
    return name if name.isprintable() else ascii(name)[1:-1]


def humanize(class_name: str) -> str:
    """Split a class name into words, "BasketballDunk" -> "basketball dunk", as a caption for videos without one."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[_\-]+", " ", class_name)
    return " ".join(words.lower().split())


def spoken(label: str | None) -> str | None:
    """Return a label as words for a caption, or None if it is a number or absent."""
    return None if label is None or label.isdecimal() else humanize(label)


def ordered_classes(labels: Iterable[str | None]) -> tuple[str, ...]:
    """Return the distinct labels sorted numerically if all are numbers, else by name; the index is the class index."""
    names = set(labels) - {None}
    return tuple(sorted(names, key=int if all(name.isdecimal() for name in names) else None))


def no_split(spec: str, split: Split, there: str) -> NoSplitError:
    """Return the error for a missing split; `there` lists the existing ones, such as "train, test"."""
    return NoSplitError(f"{spec}: has no {split} split; choose {there}, or all")


def as_folder(root: str, spec: str) -> Path:
    """Return the folder at a path. Raises DataError if it does not exist."""
    path = user_path(root)
    if not root or not path.is_dir():
        raise DataError(
            f"{spec}: there is no folder {root!r}" if root else f"{spec}: the path is missing after the colon"
        )
    return path


def as_file(path: str, spec: str) -> Path:
    """Return the regular file at a path. Raises DataError otherwise, also for a pipe, which could block."""
    file = user_path(path)
    if not path:
        raise DataError(f"{spec}: the path is missing after the colon")
    if not file.is_file():
        raise DataError(
            f"{spec}: {path!r} is a folder, a pipe or a device: give the name of a file"
            if file.exists()
            else f"{spec}: there is no file {path!r}"
        )
    return file


def videos_below(folder: Path, others: Counter[str] | None = None) -> list[Path]:
    """Return the files below a folder with a video suffix, sorted within each folder, without hidden ones.

    Those of linked folders follow, each folder once, also if links make a loop. `others` counts the suffixes of the other
    files, in lower case. Raises DataError for a folder that cannot be read.
    """

    def unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be read ({error.strerror}): mend it, or take it away")

    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    pending = [str(folder)]
    while pending:
        links = []
        for root, folders, files in os.walk(pending.pop(0), onerror=unreadable):
            status = os.stat(root)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            links += [path for name in folders if os.path.islink(path := os.path.join(root, name))]
            for name in sorted(name for name in files if not name.startswith(".")):
                suffix = os.path.splitext(name)[1].lower()
                if suffix in VIDEO_SUFFIXES:
                    found.append(Path(root) / name)
                elif others is not None:
                    others[suffix] += 1
        pending += links
    return found


def passed_over(spec: str, others: Counter[str]) -> tuple[str, ...]:
    """Return a note of the files that a folder holds beside its videos, by `videos_below`; none if there are none."""
    if not others:
        return ()
    named = [f"{count} {suffix or 'without a suffix'}" for suffix, count in others.most_common(10)]
    more = f" and {len(others) - 10} other suffixes" if len(others) > 10 else ""
    return (f"{spec}: files passed over, their suffixes are not those of videos: {', '.join(named)}{more}",)


def text_lines(path: str | Path, spec: str) -> list[str]:
    """Return the lines of a manifest with their line ends.

    Lines end at newlines only, not at other Unicode separators such as U+2028. Raises DataError for a file that is
    missing or not UTF-8.
    """
    try:
        with open(as_file(str(path), spec), encoding="utf-8-sig", newline="") as file:
            return list(file)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None


def csv_rows(path: str | Path, lines: list[str]) -> tuple[list[str], list[tuple[int, dict]]]:
    """Parse CSV lines with a header; return the column names and (line number, row) pairs. Raises DataError."""
    rows = csv.DictReader(lines)
    try:
        return list(rows.fieldnames or ()), [(rows.line_num, row) for row in rows]
    except csv.Error as error:
        where = f"{path}, line {rows.reader.line_num}"
        raise DataError(f"{where}: broken CSV: {error}; is a quote left open there or above?") from None


def cell(value: object, where: str) -> str | None:
    """Return a manifest value as stripped text, None if empty. Raises DataError unless it is text or a number."""
    if value is not None and type(value) not in (str, int, float):
        raise DataError(f"{where} must be text or a number, not {json.dumps(value, ensure_ascii=False)[:80]}")
    text = "" if value is None else str(value).strip()
    return text or None


def name_hash(name: str) -> int:
    """Return the number by which a video is assigned to a split: test if it is a multiple of 10."""
    return int(hashlib.sha256(os.fsencode(name)).hexdigest()[:8], 16)


def hash_split_rows(hashes: Tensor, split: Split, spec: str) -> Tensor:
    """Return the rows of a split as `hash_split` does, by the `name_hash` of each row, int64 (n,)."""
    if split == "all":
        return torch.arange(len(hashes))
    if split == "validation":
        raise no_split(spec, split, "train, test")
    test = hashes % 10 == 0
    if not test.any():
        test = hashes == hashes.min()
    elif test.all():
        test = hashes != hashes.max()
    rows = (test if split == "test" else ~test).nonzero()[:, 0]
    if not len(rows):
        raise NoSplitError(f"{spec}: one video cannot be split into train and test; add videos, or use split all")
    return rows


def hash_split(items: Iterable[VideoItem], split: Split, spec: str) -> tuple[VideoItem, ...]:
    """Assign about one video in ten to test by a hash of its name, so that adding videos does not move others."""
    items = tuple(items)
    if split == "all":
        return items
    if split == "validation":
        raise no_split(spec, split, "train, test")
    order = {item.name: name_hash(item.name) for item in items}
    test = {name for name, value in order.items() if value % 10 == 0}
    # The hashes of a few videos may all select one split; each split gets at least one video.
    if len(items) > 1 and not test:
        test = {min(order, key=order.get)}
    if len(items) > 1 and len(test) == len(items):
        test.remove(max(order, key=order.get))
    chosen = tuple(item for item in items if (item.name in test) == (split == "test"))
    if not chosen:
        raise NoSplitError(f"{spec}: one video cannot be split into train and test; add videos, or use split all")
    return chosen
