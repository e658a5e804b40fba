"""Data specs -> lists of videos with labels and captions. One grammar for every script:

    ucf101:ROOT[,fold=1]    the published UCF-101 layout with its split lists
    csv:FILE  jsonl:FILE    a manifest: path, and label and/or caption, and optionally split (train or test)
    folder:DIR              every video below a folder
    shapes:[count=4096,seed=0,size=32,frames=16]   the built-in captioned videos
    PATH                    a folder, or a .csv / .jsonl manifest

Specs joined with + are read one after the other and their classes are merged by name.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from larp.data import shapes
from larp.data.video import VIDEO_SUFFIXES

Split = Literal["train", "test", "all"]


class DataError(ValueError):
    """A data spec, folder or manifest that cannot be used; the message says where and what to do."""


@dataclass(frozen=True)
class VideoItem:
    """One video file: where it lies, its unique name within the set, its class index and its caption (None: none)."""

    path: Path
    name: str
    label: int | None = None
    caption: str | None = None


@dataclass(frozen=True)
class VideoSet:
    """The videos that a spec names; `classes[item.label]` is an item's class, and `notes` are lines for the user."""

    items: tuple[VideoItem, ...]
    classes: tuple[str, ...]
    spec: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)


def humanize(class_name: str) -> str:
    """Turn a class name into words: "BasketballDunk" -> "basketball dunk"; the caption of videos without one."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[_\-]+", " ", class_name)
    return " ".join(words.lower().split())


def open_videos(spec: str, split: Split = "train") -> VideoSet:
    """List the videos of a spec that belong to a split; labels mean the same class in every split.

    UCF-101 splits by its official lists, `shapes:` holds out attribute triples, manifests go by their split column;
    everything else puts a video into test if a hash of its name says so (about one in ten), whatever else lies beside
    it. Raises DataError (a ValueError) that names the spec and the remedy.
    """
    if split not in ("train", "test", "all"):
        raise DataError(f"unknown split {split!r}; choose train, test or all")
    sets = [_open_one(part, split) for part in _split_specs(spec)]
    return sets[0] if len(sets) == 1 else _merge(sets, spec)


# The grammar


def _split_specs(spec: str) -> list[str]:
    if not spec.strip():
        raise DataError(f"the data spec is empty; give one of {_known()}, or the path of a folder or manifest")
    parts: list[str] = []
    for piece in spec.split("+"):
        # A + inside a path does not start a spec: what follows it has no kind and is no path of its own
        if parts and not re.match(r"\w+:", piece) and not Path(piece.strip()).expanduser().exists():
            parts[-1] += "+" + piece
        else:
            parts.append(piece)
    return [part.strip() for part in parts]


def _open_one(spec: str, split: Split) -> VideoSet:
    kind, colon, rest = spec.partition(":")
    if not colon or Path(spec).expanduser().exists():
        kind, rest = _kind_of_path(spec), spec
    if kind not in _READERS:
        near = difflib.get_close_matches(kind, _READERS, n=1)
        raise DataError(
            f"unknown data spec {spec!r}: the kinds are {_known()}" + (f"; did you mean {near[0]}:?" if near else "")
        )
    reader, defaults = _READERS[kind]
    pieces, options = rest.split(",") if rest else [], {}
    while pieces and (match := re.fullmatch(r"\s*(\w+)=(.*)", pieces[-1])):
        if Path(",".join(pieces).strip()).expanduser().exists():
            break  # a comma inside a path starts no option
        options[match[1]] = match[2].strip()
        pieces.pop()
    return reader(",".join(pieces).strip(), split, spec, **_typed(options, defaults, spec))


def _kind_of_path(spec: str) -> str:
    path = Path(spec).expanduser()
    if path.is_dir():
        return "folder"
    if path.suffix in (".csv", ".jsonl") and path.is_file():
        return path.suffix[1:]
    if path.is_file():
        raise DataError(
            f"data spec {spec!r} is a file, but no .csv or .jsonl manifest; give the folder, or list it in a manifest"
        )
    near = difflib.get_close_matches(spec, _READERS, n=1)
    hint = f"; did you mean {near[0]}:?" if near else ""
    raise DataError(f"data spec {spec!r} is neither a path that exists nor one of the kinds {_known()}{hint}")


def _typed(options: dict[str, str], defaults: dict[str, int], spec: str) -> dict[str, int]:
    for name, value in options.items():
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1)
            known = ", ".join(f"{k}={v}" for k, v in defaults.items()) or "none"
            raise DataError(
                f"{spec}: unknown option {name!r}; known: {known}" + (f"; did you mean {near[0]}?" if near else "")
            )
        if not re.fullmatch(r"\d+", value):
            raise DataError(f"{spec}: option {name}={value!r} must be a whole number")
    return {**defaults, **{name: int(value) for name, value in options.items()}}


def _merge(sets: list[VideoSet], spec: str) -> VideoSet:
    classes = tuple(dict.fromkeys(name for videos in sets for name in videos.classes))
    taken: set[str] = set()
    items = []
    for number, videos in enumerate(sets, 1):
        for item in videos.items:
            name = item.name if item.name not in taken else f"{number}:{item.name}"
            taken.add(name)
            label = None if item.label is None else classes.index(videos.classes[item.label])
            items.append(replace(item, name=name, label=label))
    return VideoSet(tuple(items), classes, spec, tuple(note for videos in sets for note in videos.notes))


# The kinds


def _read_ucf101(root: str, split: Split, spec: str, fold: int) -> VideoSet:
    base = _folder(root, spec)
    home = next((base / name for name in ("UCF-101", "UCF101") if (base / name).is_dir()), base)
    found = {f.name: _videos_below(f) for f in sorted(home.iterdir()) if f.is_dir() and f.name != "ucfTrainTestlist"}
    classes = tuple(name for name, files in found.items() if files)
    if not classes:
        raise DataError(f"{spec}: no class folder with videos in {home}; expected Class/v_Class_gXX_cYY.avi there")
    files = [(path, name) for name in classes for path in found[name]]
    notes: tuple[str, ...] = ()
    if split != "all":
        files, notes = _official_split(spec, base, home, classes, files, split, fold)
    items = [VideoItem(p, f"{name}/{p.stem}", classes.index(name), humanize(name)) for p, name in files]
    return VideoSet(tuple(items), classes, spec, notes)


def _official_split(spec: str, base: Path, home: Path, classes, files, split: str, fold: int):
    """Keep the files that the official list of a split names; absent classes are normal, unknown ones are not."""
    if fold not in (1, 2, 3):
        raise DataError(f"{spec}: fold={fold}; UCF-101 has the folds 1, 2 and 3")
    places = [place / "ucfTrainTestlist" for place in (base, home, home.parent, base.parent)]
    lists = next((place for place in places if place.is_dir()), None)
    if lists is None:
        raise DataError(
            f"{spec}: no folder ucfTrainTestlist in {base} or {base.parent}; unpack UCF-101's official splits there "
            "(UCF101TrainTestSplits-RecognitionTask.zip)"
        )
    train, test = (_stems(lists / f"{part}list{fold:02d}.txt", spec) for part in ("train", "test"))
    listed = sorted({name.split("/")[0] for name in train | test})
    unknown = [name for name in classes if name not in listed]
    if unknown:
        near = {name: difflib.get_close_matches(name, listed, n=1) for name in unknown[:5]}
        named = ", ".join(f"{name!r}" + (f" (nearest: {n[0]!r})" if n else "") for name, n in near.items())
        raise DataError(
            f"{spec}: {len(unknown)} of {len(classes)} class folders are not in the lists of {lists}: {named}; "
            f"rename or remove them, or read {home} as folder:"
        )
    keep = train if split == "train" else test
    chosen = [(path, name) for path, name in files if f"{name}/{path.stem}" in keep]
    if not chosen:
        raise DataError(
            f"{spec}: none of the {len(files)} videos is in {lists / f'{split}list{fold:02d}.txt'}; "
            f"their names must be those of the list, such as {min(keep, default='(empty list)')}"
        )
    notes = []
    if absent := [name for name in listed if name not in classes]:
        notes.append(
            f"{spec}: {len(classes)} of the {len(listed)} listed classes are here; labels are 0 to {len(classes) - 1}"
        )
    here = {f"{name}/{path.stem}" for path, name in files}
    if extra := sorted(here - train - test):
        notes.append(f"{spec}: {len(extra)} files are in no list of fold {fold} and left out, such as {extra[0]}")
    if missing := sum(1 for name in keep - here if name.split("/")[0] not in absent):
        notes.append(f"{spec}: {missing} listed {split} files of the classes here are missing")
    return chosen, tuple(notes)


def _stems(path: Path, spec: str) -> set[str]:
    if not path.is_file():
        raise DataError(f"{spec}: the split list {path} is missing")
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {os.path.splitext(parts[0])[0] for parts in lines if parts}


def _read_folder(root: str, split: Split, spec: str) -> VideoSet:
    base = _folder(root, spec)
    files = _videos_below(base)
    if not files:
        suffixes = " ".join(sorted(VIDEO_SUFFIXES))
        raise DataError(f"{spec}: no video below {base}; looked for files ending in {suffixes}")
    items = [VideoItem(path, path.relative_to(base).as_posix()) for path in files]
    return VideoSet(_hash_split(items, split, spec), (), spec)


def _read_csv(path: str, split: Split, spec: str) -> VideoSet:
    rows = csv.DictReader(_lines(path, spec))
    try:
        if "path" not in (rows.fieldnames or ()):
            raise DataError(
                f"{path}, line 1: the header must name a column path (and label, caption, split), not {rows.fieldnames}"
            )
        numbered = [(rows.line_num, row) for row in rows]
    except csv.Error as error:
        where = f"{path}, line {rows.reader.line_num}"
        raise DataError(f"{where}: broken CSV: {error}; is a quote left open there or above?") from None
    return _manifest(numbered, path, split, spec)


def _read_jsonl(path: str, split: Split, spec: str) -> VideoSet:
    rows = []
    for number, line in enumerate(_lines(path, spec), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: broken JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict):
            raise DataError(
                f'{path}, line {number}: each line must be an object such as {{"path": ...}}, not {line.strip()[:40]}'
            )
        rows.append((number, row))
    return _manifest(rows, path, split, spec)


def _manifest(rows: list[tuple[int, dict]], path: str, split: Split, spec: str) -> VideoSet:
    """Build a set from (line number, row) pairs; classes come from the whole file, so that splits agree on labels."""
    base = Path(path).expanduser().parent
    if not rows:
        raise DataError(f"{path}: the manifest lists no video")
    values = [
        {key: _cell(row.get(key), f"{path}, line {number}: {key}") for key in ("path", "label", "caption", "split")}
        for number, row in rows
    ]
    names: dict[str, int] = {}
    for (number, _), row in zip(rows, values, strict=True):
        if not row["path"]:
            raise DataError(f"{path}, line {number}: no path")
        if row["path"] in names:
            raise DataError(f"{path}, line {number}: lists {row['path']} again (first in line {names[row['path']]})")
        names[row["path"]] = number
        if row["split"] not in (None, "train", "test"):
            raise DataError(f"{path}, line {number}: split is {row['split']!r}; it must be train or test")
        if (row["split"] is None) != (values[0]["split"] is None):
            raise DataError(f"{path}, line {number}: some lines have a split and others do not; give all or none")
    labels = {row["label"] for row in values} - {None}
    classes = tuple(sorted(labels, key=int if all(label.isdecimal() for label in labels) else None))
    index = {name: k for k, name in enumerate(classes)}
    items = [
        VideoItem(base / row["path"], row["path"], index.get(row["label"]), row["caption"] or _spoken(row["label"]))
        for row in values
    ]
    if not any(item.path.is_file() for item in items):
        raise DataError(
            f"{path}: none of its {len(items)} videos exists, such as {items[0].path}; "
            "paths are relative to the manifest"
        )
    if values[0]["split"] is None:
        return VideoSet(_hash_split(items, split, spec), classes, spec)
    chosen = tuple(item for item, row in zip(items, values, strict=True) if split in ("all", row["split"]))
    if not chosen:
        raise DataError(f"{path}: no line has split {split}")
    return VideoSet(chosen, classes, spec)


def _read_shapes(rest: str, split: Split, spec: str, **options: int) -> VideoSet:
    if rest:
        raise DataError(f"{spec}: shapes: takes only options, such as shapes:count=4096,seed=0; {rest!r} is none")
    parts = ("train", "test") if split == "all" else (split,)
    classes = tuple(f"{colour} {shape}" for colour in shapes.COLOURS for shape in shapes.SHAPES)
    items = []
    for part in parts:
        folder = shapes.materialise(part, **options)
        for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            label = classes.index(f"{row['colour']} {row['shape']}")
            items.append(VideoItem(folder / row["path"], f"{part}/{row['path']}", label, row["caption"]))
    return VideoSet(tuple(items), classes, spec)


_READERS: dict[str, tuple[Callable[..., VideoSet], dict[str, int]]] = {
    "ucf101": (_read_ucf101, {"fold": 1}),
    "csv": (_read_csv, {}),
    "jsonl": (_read_jsonl, {}),
    "folder": (_read_folder, {}),
    "shapes": (_read_shapes, {"count": 4096, "seed": 0, "size": 32, "frames": 16}),
}


# Helpers


def _known() -> str:
    return ", ".join(f"{kind}:" for kind in _READERS)


def _folder(root: str, spec: str) -> Path:
    path = Path(root).expanduser()
    if not root or not path.is_dir():
        raise DataError(
            f"{spec}: there is no folder {root!r}" if root else f"{spec}: the path is missing after the colon"
        )
    return path


def _file(path: str, spec: str) -> Path:
    if not Path(path).expanduser().is_file():
        raise DataError(
            f"{spec}: there is no file {path!r}" if path else f"{spec}: the path is missing after the colon"
        )
    return Path(path).expanduser()


def _videos_below(folder: Path) -> list[Path]:
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(root) / f for f in sorted(files) if os.path.splitext(f)[1].lower() in VIDEO_SUFFIXES and f[0] != "."
        ]
    return found


def _lines(path: str, spec: str) -> list[str]:
    """The lines of a manifest with their ends, cut at newlines only: JSON and CSV text may hold U+2028 and its like."""
    try:
        with open(_file(path, spec), encoding="utf-8-sig", newline="") as file:
            return list(file)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None


def _cell(value: object, where: str) -> str | None:
    if value is not None and type(value) not in (str, int, float):
        raise DataError(f"{where} must be text or a number, not {json.dumps(value, ensure_ascii=False)[:80]}")
    text = "" if value is None else str(value).strip()
    return text or None


def _spoken(label: str | None) -> str | None:
    return None if label is None or label.isdecimal() else humanize(label)


def _hash_split(items: Iterable[VideoItem], split: Split, spec: str) -> tuple[VideoItem, ...]:
    """Put about one video in ten into test by a hash of its name, so that a growing folder moves no test video."""
    items = tuple(items)
    if split == "all":
        return items
    order = {item.name: int(hashlib.sha256(item.name.encode()).hexdigest()[:8], 16) for item in items}
    test = {name for name, value in order.items() if value % 10 == 0}
    # a handful of videos may hash to one side only; each split then still gets one
    if len(items) > 1 and not test:
        test = {min(order, key=order.get)}
    if len(items) > 1 and len(test) == len(items):
        test.remove(max(order, key=order.get))
    chosen = tuple(item for item in items if (item.name in test) == (split == "test"))
    if not chosen:
        raise DataError(f"{spec}: one video cannot be split into train and test; add videos, or use split all")
    return chosen
