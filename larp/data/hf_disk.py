"""Lists the videos of a data set that the package `datasets` saved with `save_to_disk`; rows stay in its mapped files.

The column of videos has the type Video (bytes in the data set, or paths) or holds paths as text. It is read as stored, so
torchcodec is not needed.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from larp.data.listing import (
    DataError,
    Split,
    StoredItems,
    VideoItem,
    VideoSet,
    as_folder,
    hash_split_rows,
    join_captions,
    name_hash,
    no_split,
    ordered_classes,
    spoken,
)
from larp.data.stored_video import StoredVideo
from larp.data.video import VideoError
from larp.files import user_path

import torch

_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class RowVideo(StoredVideo):
    """A video whose bytes lie in a row of a data set."""

    where: str
    """The folder of the data set, its part, the row, and the place in the row if it has several videos."""
    row: int
    mtime_ns: int
    columns: Any = field(compare=False, repr=False)
    place: int | None = None
    """In a column of lists of videos."""

    def __str__(self) -> str:
        return self.where

    @property
    def name(self) -> str:
        """Last part of where it lies."""
        return self.where.rpartition("/")[2]

    def is_file(self) -> bool:
        """Whether the row holds a video."""
        return video_field(self.columns, self.row, "bytes", self.place, whole=False) is not None

    def stat(self) -> SimpleNamespace:
        """Return the size of the video and the time of the data set."""
        return SimpleNamespace(st_size=len(self.read()), st_mtime_ns=self.mtime_ns)

    def read(self) -> bytes:
        """Return the bytes of the video."""
        data = video_field(self.columns, self.row, "bytes", self.place)
        if data is None:
            raise VideoError(f"{self.where}: the row holds no video")
        return data


class _Part:
    """One split of a data set; columns of videos, captions and labels by name, "" for none."""

    def __init__(self, name: str, rows: Any, folder: Path, columns: tuple[str, str, str]):
        self.name, self.folder, self.size = name, folder, len(rows)
        self.video, self.caption, self.label = columns
        self.videos = rows.select_columns([self.video]).with_format("arrow")
        self.texts = rows.select_columns([column for column in columns[1:] if column]).with_format("arrow")
        self.holds_bytes = rows.features[self.video].__class__.__name__ == "Video"
        self.class_names = getattr(rows.features.get(self.label), "names", None)
        self.mtime_ns = save_time(folder)

    def cell(self, column: str, row: int) -> Any:
        return self.texts[row][column][0].as_py() if column else None

    def label_of(self, row: int) -> str | None:
        value = self.cell(self.label, row)
        return None if value is None or value == -1 else self.class_names[value] if self.class_names else str(value)

    def path(self, row: int) -> Path | RowVideo:
        if self.holds_bytes:
            stored = video_field(self.videos, row, "bytes", whole=False) is not None
            named = None if stored else video_field(self.videos, row, "path")
        else:
            named = self.videos[row][self.video][0].as_py()
        if named:
            return self.folder / user_path(named)
        return RowVideo(f"{self.folder}, row {row}", row, self.mtime_ns, self.videos)


def read_hf_disk(folder: str, split: Split, spec: str, *, video: str, caption: str, label: str) -> VideoSet:
    """List the videos of a saved Dataset or DatasetDict.

    A DatasetDict has its own splits; of a Dataset a hash of the row number selects about one in ten for test. Columns are by
    default video, caption or text, and label. Raises DataError.
    """
    base = as_folder(folder, spec)
    parts = _open(base, spec, video, caption, label)
    if parts[0].class_names:
        classes = tuple(parts[0].class_names)
    else:
        classes = ordered_classes(part.label_of(row) for part in parts if part.label for row in range(part.size))
    number = {name: k for k, name in enumerate(classes)}
    if len(parts) > 1 or parts[0].name:
        if split != "all" and split not in [part.name for part in parts]:
            raise no_split(spec, split, ", ".join(part.name for part in parts))
        parts = [part for part in parts if split in ("all", part.name)]
        rows = torch.arange(sum(part.size for part in parts))
    else:
        hashes = torch.tensor([name_hash(str(row)) for row in range(parts[0].size if split != "all" else 0)])
        rows = hash_split_rows(hashes, split, spec) if split != "all" else torch.arange(parts[0].size)
    if not len(rows):
        raise DataError(f"{spec}: 0 rows in {base}: save a data set with videos there")
    starts = list(accumulate((part.size for part in parts), initial=0))

    def make(row: int) -> VideoItem:
        which = bisect.bisect_right(starts, row) - 1
        part, local = parts[which], row - starts[which]
        name = part.label_of(local)
        text = part.cell(part.caption, local)
        text = join_captions(text if isinstance(text, list) else [text])
        called = f"{part.name}/{local:08d}" if part.name else f"{local:08d}"
        return VideoItem(part.path(local), called, number.get(name), text or spoken(name))

    if not all(part.holds_bytes for part in parts):
        return VideoSet(tuple(make(row) for row in rows.tolist()), classes, spec)
    state = [(part.name, part.size, part.mtime_ns, part.video, part.caption, part.label) for part in parts]
    fingerprint = hashlib.sha256(repr([state, split, classes]).encode()).hexdigest()[:16]
    return VideoSet(StoredItems(make, rows, fingerprint, [part.size for part in parts]), classes, spec)


def load_saved(base: Path, spec: str) -> dict[str, Any]:
    """Return the splits of a saved DatasetDict by name, or {"": a saved Dataset}. Raises DataError."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{spec}: needs the package datasets: pip install 'larp-mllm[text]'") from error
    try:
        loaded = datasets.load_from_disk(str(base))
    except Exception as error:  # datasets and pyarrow raise many types
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{spec}: cannot be loaded ({said}); give a folder that save_to_disk wrote") from error
    return dict(loaded) if isinstance(loaded, Mapping) else {"": loaded}


def save_time(folder: Path) -> int:
    """Return when a split was saved, in ns: the time of the files that every save writes anew."""
    return max(file.stat().st_mtime_ns for file in folder.glob("*.json"))


def _open(base: Path, spec: str, video: str, caption: str, label: str) -> list[_Part]:
    named = load_saved(base, spec)
    order = sorted(named, key=lambda name: (_SPLITS.index(name) if name in _SPLITS else len(_SPLITS), name))
    first = named[order[0]]
    kinds = {column: kind.__class__.__name__ for column, kind in first.features.items()}
    texts = [column for column, kind in first.features.items() if _is_text(kind)]
    # A column of lists of captions, as MSR-VTT and VATEX have them.
    captions = [column for column, kind in first.features.items() if _is_text(getattr(kind, "feature", kind))]
    typed = [column for column, kind in kinds.items() if kind == "Video"]
    columns = (
        _column("video", video, [*(("video",) if "video" in kinds else ()), *typed], [*typed, *texts], spec),
        _column("caption", caption, [c for c in ("caption", "text") if c in captions], captions, spec),
        _column("label", label, [c for c in ("label",) if c in kinds], list(kinds), spec),
    )
    if not columns[0]:
        raise DataError(f"{spec}: has no column of videos; give video=COLUMN, one of {', '.join(kinds)}")
    return [_Part(name, named[name], base / name, columns) for name in order]


def _is_text(kind: Any) -> bool:
    return getattr(kind, "dtype", "") in ("string", "large_string")


def _column(option: str, given: str, defaults: list[str], possible: list[str], spec: str) -> str:
    if given and given not in possible:
        raise DataError(
            f"{spec}: {option}={given}: no such column of this use; there are {', '.join(possible) or 'none'}"
        )
    return given or (defaults[0] if defaults and defaults[0] in possible else "")


def video_field(columns: Any, row: int, name: str, place: int | None = None, whole: bool = True) -> Any:
    """Return a field, "bytes" or "path", of the video in a row, or of the one at a place of its list; None without one.

    columns: the column of videos alone, in the format "arrow". With whole=False b"" stands for bytes.
    """
    found = columns[row].column(0)[0]
    if place is not None and found.is_valid:
        found = found.values[place]
    value = found[name] if found.is_valid else None
    if value is None or not value.is_valid:
        return None
    return value.as_py() if whole else b""
