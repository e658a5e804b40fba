"""Parses data specs, as every script takes them, into lists of videos with labels and captions.

    ucf101:ROOT[,fold=1][,classes=A/B]   UCF-101 in its published layout, with its split lists; the named classes alone
    k600:ROOT[,videos=DIR][,test=validation][,classes=A/B]   Kinetics-600: its annotation files, or lists of (path, label)
    csv:FILE  jsonl:FILE    a manifest with path and, optionally, label, caption, group and split (train, validation or
                            test); a path may name an .npy file of frames
    folder:DIR              every video below a folder
    wds:PATTERN[,caption=FIELD]   WebDataset shards, see larp/data/shards.py
    hf-disk:FOLDER[,video=COLUMN][,caption=COLUMN][,label=COLUMN]   a data set that the package datasets saved
    shapes:[count=4096,seed=0,size=32,frames=16]   the built-in captioned videos
    PATH                    a folder, or a .csv or .jsonl manifest

Specs joined with + are concatenated; their classes are merged by name.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from larp.data import shapes
from larp.data.hf_disk import read_hf_disk
from larp.data.kinetics import read_kinetics
from larp.data.listing import (
    CAPTION_BREAK,
    DataError,
    NoSplitError,
    Split,
    VideoItem,
    VideoSet,
    as_folder,
    captions_of,
    cell,
    csv_rows,
    hash_split,
    humanize,
    join_captions,
    no_split,
    of_classes,
    ordered_classes,
    passed_over,
    spoken,
    text_lines,
    videos_below,
)
from larp.data.shards import read_shards
from larp.data.video import VIDEO_SUFFIXES
from larp.files import user_path
from larp.models.class_names import class_number, unknown_class

UCF101_GROUP = re.compile(r"(v_\w+_g\d+)_c\d+")
"""Name of a UCF-101 clip; the first match group is its UCF-101 group, the source video that it is cut from."""
_COLUMNS = ("path", "label", "caption", "split", "group")
_SPLITS = ("train", "validation", "test")
_UCF101 = {1: (9537, 3783), 2: (9586, 3734), 3: (9624, 3696)}
"""Number of videos in the published train and test lists, by fold."""

T = TypeVar("T")


def open_videos(spec: str, split: Split = "train") -> VideoSet:
    """List the videos of a spec that belong to a split; a label means the same class in every split.

    UCF-101 and Kinetics-600 use their official lists, `shapes:` holds out attribute triples, and manifests use their
    split column. For other data a hash of the video's name selects about one in ten for the test split.

    Raises DataError (a ValueError) for a spec that cannot be used, and its subclass NoSplitError where the data have no
    such split ("validation" is rare).
    """
    if split not in (*_SPLITS, "all"):
        raise DataError(f"unknown split {split!r}; choose train, test or all, or validation where the data have it")
    sets = [_open_one(part, split) for part in split_specs(spec)]
    return sets[0] if len(sets) == 1 else _merge(sets, spec)


def evenly_spaced(items: Sequence[T], count: int) -> tuple[T, ...]:
    """Return `count` evenly spaced items, so that a set sorted by class shows every class; all of them if there are fewer."""
    count = min(count, len(items))
    return tuple(items[i * len(items) // count] for i in range(count))


def split_specs(spec: str) -> list[str]:
    """Return the parts of a data spec that are joined with +; DataError if it is empty."""
    if not spec.strip():
        raise DataError(f"the data spec is empty; give one of {_known()}, or the path of a folder or manifest")
    parts: list[str] = []
    for piece in spec.split("+"):
        # A + inside a path does not start a spec: the part after it has no kind and does not exist as a path.
        if parts and not re.match(r"[\w-]+:", piece) and not user_path(piece.strip()).exists():
            parts[-1] += "+" + piece
        else:
            parts.append(piece)
    return [part.strip() for part in parts]


def _open_one(spec: str, split: Split) -> VideoSet:
    kind, colon, rest = spec.partition(":")
    if not colon or user_path(spec).exists():
        kind, rest = _kind_of_path(spec), spec
    if kind not in _READERS:
        near = difflib.get_close_matches(kind, _READERS, n=1)
        raise DataError(
            f"unknown data spec {spec!r}: the kinds are {_known()}" + (f"; did you mean {near[0]}:?" if near else "")
        )
    reader, defaults = _READERS[kind]
    pieces, options = rest.split(",") if rest else [], {}
    while pieces and (match := re.fullmatch(r"\s*(\w+)=(.*)", pieces[-1])):
        if user_path(",".join(pieces).strip()).exists():
            break  # the comma is part of a path
        options[match[1]] = match[2].strip()
        pieces.pop()
    typed = _typed(options, defaults, spec)
    classes = typed.pop("classes", "")
    videos = reader(",".join(pieces).strip(), split, spec, **typed)
    return _of_classes(videos, classes.split("/"), spec) if classes else videos


def _of_classes(videos: VideoSet, names: Sequence[str], spec: str) -> VideoSet:
    found = {name: class_number(name, videos.classes) for name in names}
    if unknown := [name for name, number in found.items() if number is None]:
        raise DataError(f"{spec}: {unknown_class(unknown[0], videos.classes)}")
    return of_classes(videos, [videos.classes[number] for number in found.values()])


def _kind_of_path(spec: str) -> str:
    path = user_path(spec)
    if path.is_dir():
        return "folder"
    if path.suffix in (".csv", ".jsonl") and path.is_file():
        return path.suffix[1:]
    if path.suffix == ".clips" and path.is_file():
        raise DataError(
            f"data spec {spec!r} is a pack of clips: larp-mllm unpack-clips {spec} -o DIR, then give jsonl:DIR/clips.jsonl"
        )
    if path.suffix == ".tar" and path.is_file():
        raise DataError(f"data spec {spec!r} is a tar file: give wds:{spec} for WebDataset shards, or unpack it")
    if path.is_file():
        raise DataError(
            f"data spec {spec!r} is a file, but no .csv or .jsonl manifest; give the folder, or list it in a manifest"
        )
    near = difflib.get_close_matches(spec, _READERS, n=1)
    hint = f"; did you mean {near[0]}:?" if near else ""
    raise DataError(f"data spec {spec!r} is neither a path that exists nor one of the kinds {_known()}{hint}")


def _typed(options: dict[str, str], defaults: dict[str, int | str], spec: str) -> dict[str, int | str]:
    for name, value in options.items():
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1)
            known = ", ".join(f"{k}={v}" for k, v in defaults.items()) or "none"
            raise DataError(
                f"{spec}: unknown option {name!r}; known: {known}" + (f"; did you mean {near[0]}?" if near else "")
            )
        if isinstance(defaults[name], int) and not re.fullmatch(r"\d+", value):
            raise DataError(f"{spec}: option {name}={value!r} must be a whole number")
    return {**defaults, **{name: type(defaults[name])(value) for name, value in options.items()}}


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
    notes, missing = (tuple(x for videos in sets for x in getattr(videos, field)) for field in ("notes", "missing"))
    return VideoSet(tuple(items), classes, spec, notes, missing)


def _read_ucf101(root: str, split: Split, spec: str, fold: int) -> VideoSet:
    base = as_folder(root, spec)
    if fold not in _UCF101:
        raise DataError(f"{spec}: fold={fold}; UCF-101 has the folds 1, 2 and 3")
    if split == "validation":
        raise no_split(spec, split, "train, test")
    home = next((base / name for name in ("UCF-101", "UCF101") if (base / name).is_dir()), base)
    others: Counter[str] = Counter()
    folders = (f for f in sorted(home.iterdir()) if f.is_dir() and f.name != "ucfTrainTestlist")
    found: dict[str, dict[str, Path]] = {}
    for folder in folders:
        one_class = found.setdefault(_ucf101_spelling(folder.name), {})
        for path in videos_below(folder, others):
            one_class.setdefault(_ucf101_spelling(path.stem), path)
    classes = tuple(name for name, files in found.items() if files)
    if not classes:
        raise DataError(f"{spec}: no class folder with videos in {home}; expected Class/v_Class_gXX_cYY.avi there")
    files = [(path, name) for name in classes for path in found[name].values()]
    notes, missing, published = (), (), sum(_UCF101[fold])
    if split != "all":
        files, notes, missing = _official_split(spec, base, home, classes, files, split, fold)
        published = _UCF101[fold][split == "test"]
    items = [
        VideoItem(p, f"{name}/{p.stem}", classes.index(name), humanize(name), _ucf101_group(p.stem))
        for p, name in files
    ]
    return VideoSet(tuple(items), classes, spec, (*notes, *passed_over(spec, others)), missing, (published, 101))


def _ucf101_spelling(name: str) -> str:
    """Return the name of a class or clip in one spelling; UCF-101 itself has both HandstandPushups and HandStandPushups."""
    return name.replace("HandStandPushups", "HandstandPushups")


def _ucf101_group(stem: str) -> str | None:
    found = UCF101_GROUP.match(stem)
    return found[1] if found else None


def _official_split(spec: str, base: Path, home: Path, classes, files, split: str, fold: int):
    """Return the files on the official list of a split, notes, and the names of listed files that are missing.

    A subset of the classes is allowed; class folders that are not on the lists are an error.
    """
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
    chosen = [(path, name) for path, name in files if _ucf101_spelling(f"{name}/{path.stem}") in keep]
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
    here = {_ucf101_spelling(f"{name}/{path.stem}") for path, name in files}
    if extra := sorted(here - train - test):
        notes.append(f"{spec}: {len(extra)} files are in no list of fold {fold} and left out, such as {extra[0]}")
    if missing := sorted(name for name in keep - here if name.split("/")[0] not in absent):
        notes.append(f"{spec}: {len(missing)} listed {split} files of the classes here are missing")
    return chosen, tuple(notes), tuple(missing)


def _stems(path: Path, spec: str) -> set[str]:
    if not path.is_file():
        raise DataError(f"{spec}: the split list {path} is missing")
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {_ucf101_spelling(os.path.splitext(parts[0])[0]) for parts in lines if parts}


def _read_folder(root: str, split: Split, spec: str) -> VideoSet:
    base, others = as_folder(root, spec), Counter()
    files = videos_below(base, others)
    if not files:
        suffixes = " ".join(sorted(VIDEO_SUFFIXES))
        remedy = f"looked for files ending in {suffixes}"
        if others[".tar"]:
            remedy = f"for its .tar files give wds:{base}"
        elif others[".arrow"]:
            remedy = f"for a data set that save_to_disk wrote give hf-disk:{base}"
        raise DataError(f"{spec}: no video below {base}; {remedy}")
    items = [VideoItem(path, path.relative_to(base).as_posix()) for path in files]
    return VideoSet(hash_split(items, split, spec), (), spec, passed_over(spec, others))


def _read_csv(path: str, split: Split, spec: str) -> VideoSet:
    columns, numbered = csv_rows(path, text_lines(path, spec))
    if "path" not in columns:
        raise DataError(
            f"{path}, line 1: the header must name a column path (and label, caption, split), not {columns}"
        )
    return _manifest(numbered, path, split, spec)


def _read_jsonl(path: str, split: Split, spec: str) -> VideoSet:
    rows = []
    for number, line in enumerate(text_lines(path, spec), 1):
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
    """Build a set from (line number, row) pairs; classes are those of the whole file, so that splits share labels."""
    base = user_path(path).parent
    if not rows:
        raise DataError(f"{path}: the manifest lists no video")
    values: dict[str, dict[str, str | None]] = {}
    lines: dict[str, int] = {}
    for number, given in rows:
        row = {key: cell(given.get(key), f"{path}, line {number}: {key}") for key in _COLUMNS if key != "caption"}
        row["caption"] = _captions(given.get("caption"), f"{path}, line {number}: caption")
        if not row["path"]:
            raise DataError(f"{path}, line {number}: no path")
        row["label"] = row["label"] and _ucf101_spelling(row["label"])
        name = os.path.normpath(base / user_path(row["path"]))
        if name in values:  # another caption of a video, as MSR-VTT and VATEX have them
            where = f"{path}, line {number}: lists {row['path']} again (first in line {lines[name]})"
            _add_caption(values[name], row, where)
            continue
        values[name], lines[name] = row, number
        first = next(iter(values.values()))
        if row["split"] not in (None, *_SPLITS):
            raise DataError(
                f"{path}, line {number}: split is {row['split']!r}; it must be train or test (or validation)"
            )
        if (row["split"] is None) != (first["split"] is None):
            raise DataError(f"{path}, line {number}: some lines have a split and others do not; give all or none")
    classes = ordered_classes(row["label"] for row in values.values())
    index = {name: k for k, name in enumerate(classes)}
    items = [
        VideoItem(
            base / user_path(row["path"]),
            row["path"],
            index.get(row["label"]),
            row["caption"] or spoken(row["label"]),
            row["group"],
            row["split"],
        )
        for row in values.values()
    ]
    if not any(item.path.is_file() for item in items):
        raise DataError(
            f"{path}: none of its {len(items)} videos exists, such as {items[0].path}; "
            "paths are relative to the manifest"
        )
    if first["split"] is None:
        return VideoSet(hash_split(items, split, spec), classes, spec)
    chosen = tuple(item for item, row in zip(items, values.values(), strict=True) if split in ("all", row["split"]))
    if not chosen:
        others = ", ".join(sorted({row["split"] for row in values.values()}))
        remedy = "give other data with --eval-data, or add such lines" if split == "test" else "add such lines"
        raise NoSplitError(f"{path}: no line has split {split}, all have {others}: {remedy}")
    return VideoSet(chosen, classes, spec)


def _captions(value: object, where: str) -> str | None:
    """Return a caption, or those of a list, as `VideoItem.caption` has them. Raises DataError for values of another kind."""
    return join_captions(cell(text, where) for text in (value if isinstance(value, list) else [value]))


def _add_caption(row: dict[str, str | None], other: dict[str, str | None], where: str) -> None:
    """Add the captions of another line of the same video. Raises DataError, whose message begins with `where`, if it differs."""
    if differing := [key for key in ("label", "split", "group") if row[key] != other[key]]:
        raise DataError(
            f"{where} with another {differing[0]}: a video may have several captions, but one {differing[0]}"
        )
    if not (row["caption"] and other["caption"]):
        raise DataError(f"{where}: only lines with captions may name a video several times")
    row["caption"] = CAPTION_BREAK.join(dict.fromkeys(captions_of(row["caption"]) + captions_of(other["caption"])))


def _read_shapes(rest: str, split: Split, spec: str, **options: int) -> VideoSet:
    if rest:
        raise DataError(f"{spec}: shapes: takes only options, such as shapes:count=4096,seed=0; {rest!r} is none")
    if split == "validation":
        raise no_split(spec, split, "train, test")
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


_READERS: dict[str, tuple[Callable[..., VideoSet], dict[str, int | str]]] = {
    "ucf101": (_read_ucf101, {"fold": 1, "classes": ""}),
    "k600": (read_kinetics, {"videos": "", "test": "test", "classes": ""}),
    "csv": (_read_csv, {}),
    "jsonl": (_read_jsonl, {}),
    "folder": (_read_folder, {}),
    "wds": (read_shards, {"caption": ""}),
    "hf-disk": (read_hf_disk, {"video": "", "caption": "", "label": ""}),
    "shapes": (_read_shapes, {"count": 4096, "seed": 0, "size": 32, "frames": 16}),
}


def _known() -> str:
    return ", ".join(f"{kind}:" for kind in _READERS)
