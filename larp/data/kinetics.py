"""Lists the videos of Kinetics-600 from its published annotation files, or from lists of (path, label).

The lists are train.csv, validate.csv and test.csv, or similar names. A line of a published list describes a ten-second
segment of a video: label, youtube_id, time_start, time_end, split (the first test list had no labels). The files are
named youtubeid_000010_000020.mp4 or youtubeid.mp4, in any folders. Many videos are no longer available, so missing
files are reported and do not raise an error.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from larp.data.listing import (
    DataError,
    Split,
    VideoItem,
    VideoSet,
    as_folder,
    cell,
    csv_rows,
    hash_split,
    no_split,
    ordered_classes,
    spoken,
    text_lines,
    videos_below,
)
from larp.data.video import VIDEO_SUFFIXES
from larp.files import user_path

CLASSES = 600
PUBLISHED = {"train": 392_622, "validation": 30_000, "test": 60_000}
"""Number of videos by split: arXiv 1808.01340, table 1 (50 validation and 100 test videos per class)."""

_LIST_NAME = re.compile(r"(?:k(?:inetics)?[-_ ]?600[-_ ]?)?([a-z]+)")
_SPLIT_NAMES = {
    "train": "train",
    **dict.fromkeys(("val", "valid", "validate", "validation"), "validation"),
    "test": "test",
}


@dataclass(frozen=True)
class _Entry:
    """One line of a list; its file is `path`, or any file whose name without suffix is in `stems`."""

    name: str
    split: str | None
    label: str | None
    stems: tuple[str, ...] = ()
    path: str | None = None


def read_kinetics(root: str, split: Split, spec: str, *, videos: str, test: str) -> VideoSet:
    """List the Kinetics-600 videos of a split; every split has all class names of the annotation.

    Args:
        root: the folder of the lists, or of a folder `annotations` that holds them, or a single list.
        split: train, validation, test or all.
        spec: the data spec, for messages.
        videos: the folder of the videos, to which paths in lists are relative; "" is the folder of the lists.
        test: "test", or "validation" to use the validation list as the test split, since test labels are rare.

    Raises NoSplitError if there is no list of the split, DataError for an unreadable list or if no listed video exists.
    """
    if test not in ("test", "validation"):
        raise DataError(f"{spec}: test={test!r}; choose test or validation, the published split to test on")
    home, lists = _find_lists(root, spec)
    rows = [row for path, name in lists for row in _read_list(path, name, spec)]
    if test == "validation":
        remaining = [row for row in rows if row.split != "test"]
        rows = [replace(row, split="test") if row.split == "validation" else row for row in remaining]
    chosen, repeated = _of_split(rows, split, spec)
    files = _FileIndex(as_folder(videos, spec) if videos else home, rows)
    found = {row.name: path for row in chosen if (path := files.find(row)) is not None}
    missing = tuple(row.name for row in chosen if row.name not in found)
    if not found:
        raise DataError(
            f"{spec}: none of the {len(chosen)} listed {split} videos is below {files.base}, such as {missing[0]}. Name the "
            "files youtubeid_000010_000020 or youtubeid with any video suffix, or as in a list of paths, or name another "
            "folder with ,videos=DIR"
        )
    classes = ordered_classes(row.label for row in rows)
    index = {name: number for number, name in enumerate(classes)}
    items = tuple(
        VideoItem(found[row.name], row.name, index.get(row.label), spoken(row.label))
        for row in chosen
        if row.name in found
    )
    sizes = {"train": PUBLISHED["train"], test: PUBLISHED[test]} if test == "validation" else PUBLISHED
    published = sum(sizes.values()) if split == "all" else PUBLISHED[test if split == "test" else split]
    notes = _notes(spec, split, len(chosen), missing, repeated, files.unlisted)
    return VideoSet(items, classes, spec, notes, missing, (published, CLASSES))


def _find_lists(root: str, spec: str) -> tuple[Path, list[tuple[Path, str | None]]]:
    """Return the folder of the lists, and each list with the split that its name states (None if it states none)."""
    given = user_path(root)
    if given.is_file():
        return given.parent, [(given, _split_of_list(given))]
    base = as_folder(root, spec)
    for place in (base, base / "annotations"):
        lists: dict[str, Path] = {}
        for path in sorted(place.glob("*.csv")):
            name = _split_of_list(path)
            if name in lists:
                raise DataError(f"{spec}: two lists of the {name} split, {lists[name]} and {path}: keep one")
            if name is not None:
                lists[name] = path
        if lists:
            return base, [(path, name) for name, path in lists.items()]
    raise DataError(
        f"{spec}: no list in {base} or {base / 'annotations'}; put the published train.csv, validate.csv and test.csv "
        "there (label,youtube_id,time_start,time_end,split), or lists of path,label under these names"
    )


def _split_of_list(path: Path) -> str | None:
    match = _LIST_NAME.fullmatch(path.stem.lower())
    return _SPLIT_NAMES.get(match[1]) if match else None


def _read_list(path: Path, split: str | None, spec: str) -> list[_Entry]:
    """Read a list of any supported format; `split` applies to lines without a split."""
    lines = text_lines(path, spec)
    first = next((line.strip() for line in lines if line.strip()), "")
    names = [name.strip() for name in next(csv.reader([first]), [])]
    if "youtube_id" in names or "path" in names:
        columns, numbered = csv_rows(path, lines)
        if columns != names:
            raise DataError(f"{path}, line 1: the header must be the first line, without blanks around its names")
    elif Path(_path_and_label(first)[0]).suffix.lower() in VIDEO_SUFFIXES:
        pairs = [(number, _path_and_label(line)) for number, line in enumerate(lines, 1) if line.strip()]
        numbered = [(number, {"path": name, "label": label}) for number, (name, label) in pairs]
    else:
        raise DataError(
            f"{path}, line 1: neither the header of the published annotation (label,youtube_id,time_start,time_end,split)"
            f" nor one with a column path, nor a video's path and label: {first[:80]!r}"
        )
    read = _annotated if "youtube_id" in names else _listed_path
    return [read(row, f"{path}, line {number}", split) for number, row in numbered]


def _path_and_label(line: str) -> tuple[str, str]:
    """Split a line "path,label" or "path label"; the path may contain commas and spaces."""
    line = line.strip()
    path, _, label = line.rpartition("," if "," in line else " ")
    return (path.strip().strip('"'), label.strip().strip('"')) if path else (label, "")


def _annotated(row: dict, where: str, split: str | None) -> _Entry:
    values = _cells(row, ("youtube_id", "time_start", "time_end", "label", "split"), where)
    youtube, *times = (values[key] for key in ("youtube_id", "time_start", "time_end"))
    if youtube is None:
        raise DataError(f"{where}: no youtube_id")
    try:
        start, end = (None if time is None else int(float(time)) for time in times)
    except (ValueError, OverflowError):
        raise DataError(f"{where}: time_start and time_end must be seconds, not {times[0]} and {times[1]}") from None
    names = (youtube,)
    if start is not None and end is not None:
        names = (f"{youtube}_{start:06d}_{end:06d}", f"{youtube}_{start}_{end}", youtube)
    return _Entry(names[0], _split_of(values["split"], split, where), values["label"], stems=names)


def _listed_path(row: dict, where: str, split: str | None) -> _Entry:
    values = _cells(row, ("path", "label", "split"), where)
    if values["path"] is None:
        raise DataError(f"{where}: no path")
    return _Entry(values["path"], _split_of(values["split"], split, where), values["label"], path=values["path"])


def _cells(row: dict, columns: Iterable[str], where: str) -> dict[str, str | None]:
    return {name: cell(row.get(name), f"{where}: {name}") for name in columns}


def _split_of(value: str | None, otherwise: str | None, where: str) -> str | None:
    if value is None:
        return otherwise
    if value.lower() not in _SPLIT_NAMES:
        raise DataError(f"{where}: split is {value!r}; it must be one of {', '.join(_SPLIT_NAMES)}")
    return _SPLIT_NAMES[value.lower()]


def _of_split(rows: list[_Entry], split: Split, spec: str) -> tuple[list[_Entry], int]:
    """Return the lines of a split without repeated names, and the number of removed lines."""
    if not rows:
        raise DataError(f"{spec}: the lists hold no video")
    there = list(dict.fromkeys(row.split for row in rows if row.split is not None))
    without = sum(row.split is None for row in rows)
    if there and without:
        raise DataError(f"{spec}: {without} of {len(rows)} listed videos have no split and others do; give all or none")
    if there:
        chosen = [row for row in rows if split in ("all", row.split)]
        if not chosen:
            hint = ", or add ,test=validation to the spec" if split == "test" and "validation" in there else ""
            raise no_split(spec, split, ", ".join(there) + hint)
    else:
        names = {item.name for item in hash_split([VideoItem(Path(), row.name) for row in rows], split, spec)}
        chosen = [row for row in rows if row.name in names]
    once: dict[str, _Entry] = {}
    for row in chosen:
        once.setdefault(row.name, row)
    return list(once.values()), len(chosen) - len(once)


class _FileIndex:
    """Finds the files of listed videos below a folder; `unlisted` holds the video files that no list names."""

    def __init__(self, base: Path, rows: list[_Entry]):
        self.base, self._by_stem = base, defaultdict(list)
        wanted = {stem for row in rows for stem in row.stems}
        # Lists of paths need no search.
        for path in videos_below(base) if wanted else ():
            self._by_stem[path.stem].append(path)
        self.unlisted = [paths[0] for stem, paths in self._by_stem.items() if stem not in wanted]

    def find(self, row: _Entry) -> Path | None:
        """Return the file of a line; of several, prefer one in a folder named after its split."""
        if row.path is not None:
            path = self.base / user_path(row.path)
            return path if path.is_file() else None
        found = next((self._by_stem[stem] for stem in row.stems if stem in self._by_stem), None)
        return None if found is None else min(found, key=lambda path: row.split not in self._splits(path))

    def _splits(self, path: Path) -> set[str | None]:
        return {_SPLIT_NAMES.get(part.lower()) for part in path.relative_to(self.base).parts[:-1]}


def _notes(
    spec: str, split: Split, listed: int, missing: tuple[str, ...], repeated: int, unlisted: list[Path]
) -> tuple[str, ...]:
    notes = []
    if missing:
        notes.append(f"{spec}: {len(missing)} of {listed} listed {split} videos are missing, such as {missing[0]}")
    if repeated:
        notes.append(f"{spec}: {repeated} lines of the {split} split name a video again and are left out")
    if unlisted:
        notes.append(f"{spec}: {len(unlisted)} files are in no list and left out, such as {unlisted[0]}")
    return tuple(notes)
