"""Finds problems of a data set: missing, broken or short videos, and videos that are in two splits."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path, PurePosixPath
from statistics import median_low

from larp.data.clips import ClipShape, choose_start
from larp.data.datasets import UCF101_GROUP, DataError, NoSplitError, VideoSet, open_videos, split_specs
from larp.data.loader import in_order
from larp.data.video import VideoError, VideoInfo, iter_frames, probe

from tqdm import tqdm

_SPLITS = ("train", "validation", "test")
_HEAD_BYTES = 1 << 16
_YOUTUBE_ID = re.compile(r"([\w-]{11})_\d+_\d+")


@dataclass(frozen=True)
class Problem:
    """One finding: an error invalidates training or its metrics, a warning does not."""

    severity: str
    """Either error or warning."""
    text: str
    names: tuple[str, ...] = ()
    """The affected videos, each with its reason if there is one."""


@dataclass(frozen=True)
class SplitReport:
    """The videos of one split of one data spec."""

    spec: str
    split: str
    listed: int
    """Number of videos of the split, including those without a file."""
    usable: int
    """Number of videos that can be read and are long enough."""
    classes: dict[str, int]
    """Number of usable videos by class; empty for data without classes."""
    missing: tuple[str, ...]
    """Names of videos without a file."""
    broken: tuple[tuple[str, str], ...]
    """(name, reason) of videos that cannot be read."""
    short: tuple[tuple[str, str], ...]
    """(name, reason) of videos that are shorter than a clip."""
    infos: tuple[VideoInfo, ...]
    """Descriptions of all videos that can be read."""
    published: tuple[int, int] | None
    """Number of videos and classes of the published split."""
    notes: tuple[str, ...]
    """The notes of `VideoSet`."""


@dataclass(frozen=True)
class Report:
    """The result of `examine`."""

    splits: tuple[SplitReport, ...]
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether there are no errors."""
        return all(problem.severity != "error" for problem in self.problems)

    def describe(self, most: int = 10) -> str:
        """Return the report as text, with at most `most` lines of each list (0: all)."""
        lines: list[str] = []
        for spec in dict.fromkeys(split.spec for split in self.splits):
            lines += [spec, *_table([split for split in self.splits if split.spec == spec], most)]
        for problem in self.problems:
            lines += [f"{problem.severity}: {problem.text}", *_first(problem.names, most)]
        count = Counter(problem.severity for problem in self.problems)
        return "\n".join([*lines, f"errors: {count['error']}, warnings: {count['warning']}"])


def examine(
    spec: str, *, frames: int = 16, stride: int = 1, decode: bool = False, workers: int = 4, progress: bool = True
) -> Report:
    """Open every video of every split of a data spec and compare the splits.

    Args:
        spec: see `larp.data.datasets`.
        frames, stride: shape of a clip; shorter videos are reported.
        decode: decode every frame, which finds damage after the first one but is slow.
        workers: number of threads.
        progress: show a progress bar.

    Raises DataError if no split of a part of the spec can be opened, ValueError for invalid numbers.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; at least one thread is needed")
    shape = ClipShape(frames, 1, 1, stride)
    sets, problems = [], []
    for part in split_specs(spec):
        opened, mistakes = _open_splits(part)
        sets += opened
        problems += mistakes
    paths = list(dict.fromkeys(item.path for _, videos in sets for item in videos.items))
    bar = tqdm(total=len(paths), desc="examining videos", unit="video", disable=not progress)
    found: dict[Path, VideoInfo | str | None] = {}
    with bar:
        for path, info in zip(paths, in_order(lambda path: _probe(path, decode), paths, workers), strict=True):
            found[path] = info
            bar.update()
    splits = tuple(_report_split(split, videos, found, shape) for split, videos in sets)
    for split in splits:
        problems += _split_problems(split)
    for part in split_specs(spec):
        problems += _overlaps([(split, videos) for split, videos in sets if videos.spec == part])
    problems += _same_bytes(sets, [path for path in paths if found[path] is not None], workers)
    return Report(splits, tuple(sorted(problems, key=lambda problem: problem.severity != "error")))


def _open_splits(part: str) -> tuple[list[tuple[str, VideoSet]], list[Problem]]:
    """Open the splits of a part of a spec, or split "all" where none can be opened."""
    opened, mistakes = [], {}
    for split in _SPLITS:
        try:
            opened.append((split, open_videos(part, split)))
        except NoSplitError:
            continue
        except DataError as error:
            mistakes[str(error)] = Problem("error", str(error))
    return opened or [("all", open_videos(part, "all"))], list(mistakes.values())


def _probe(path: Path, decode: bool) -> VideoInfo | str | None:
    """Describe a video file; return the reason if it cannot be read, None if it does not exist."""
    try:
        if not path.is_file():
            return None
        info = probe(path)
        return replace(info, frames=sum(1 for _ in iter_frames(path))) if decode else info
    except (VideoError, OSError) as error:
        return str(error).removeprefix(f"{path}: ")


def _report_split(
    split: str, videos: VideoSet, found: dict[Path, VideoInfo | str | None], shape: ClipShape
) -> SplitReport:
    missing, broken, short, infos = list(videos.missing), [], [], []
    counts = Counter(dict.fromkeys(videos.classes, 0))
    for item in videos.items:
        info = found[item.path]
        if info is None:
            missing.append(item.name)
        elif isinstance(info, str):
            broken.append((item.name, info))
        else:
            infos.append(info)
            try:
                choose_start(info.frames, shape)
            except ValueError as error:
                short.append((item.name, str(error)))
            else:
                counts.update([videos.classes[item.label]] if item.label is not None else [])
    return SplitReport(
        videos.spec,
        split,
        listed=len(videos.items) + len(videos.missing),
        usable=len(infos) - len(short),
        classes=dict(counts),
        missing=tuple(missing),
        broken=tuple(broken),
        short=tuple(short),
        infos=tuple(infos),
        published=videos.published,
        notes=videos.notes,
    )


def _split_problems(split: SplitReport) -> Iterator[Problem]:
    where, among = f"{split.spec}: {split.split} videos", f"of {split.listed}"
    if split.broken:
        names = tuple(f"{name}: {reason}" for name, reason in split.broken)
        yield Problem("error", f"{where} that cannot be read: {len(names)} {among}", names)
    if not split.usable:
        yield Problem("error", f"{where} that can be used: none {among}")
    if split.missing:
        yield Problem("warning", f"{where} without a file: {len(split.missing)} {among}", split.missing)
    if split.short:
        names = tuple(f"{name}: {reason}" for name, reason in split.short)
        yield Problem("warning", f"{where} that are too short: {len(names)} {among}", names)
    if uneven := sum(not info.even for info in split.infos):
        yield Problem("warning", f"{where} with frames at uneven times: {uneven} {among}")
    if empty := tuple(name for name, count in split.classes.items() if not count and any(split.classes.values())):
        yield Problem("warning", f"{where}: classes without one: {len(empty)} of {len(split.classes)}", empty)


def _overlaps(sets: list[tuple[str, VideoSet]]) -> Iterator[Problem]:
    """Compare the names of the videos of each two splits of one part of a spec."""
    for (one, first), (other, second) in combinations(sets, 2):
        where, both = first.spec, f"both {one} and {other}"
        names = sorted({item.name for item in first.items} & {item.name for item in second.items})
        if names:
            yield Problem("error", f"{where}: videos in {both}: {len(names)}", tuple(names))
        # Clips of one UCF-101 group are cut from one source video; the official splits never divide a group.
        groups = sorted(_groups(UCF101_GROUP, first) & _groups(UCF101_GROUP, second))
        if groups:
            yield Problem("error", f"{where}: groups of UCF-101 with clips in {both}: {len(groups)}", tuple(groups))
        films = _groups(_YOUTUBE_ID, first) & _groups(_YOUTUBE_ID, second)
        films -= {match[1] for name in names if (match := _YOUTUBE_ID.fullmatch(_stem(name)))}
        if films:
            text = f"{where}: YouTube videos with pieces in {both}: {len(films)}"
            yield Problem("warning", text, tuple(sorted(films)))


def _groups(pattern: re.Pattern, videos: VideoSet) -> set[str]:
    matches = (pattern.fullmatch(_stem(item.name)) for item in videos.items)
    return {match[1] for match in matches if match}


def _stem(name: str) -> str:
    name = PurePosixPath(name).name
    return re.sub(r"\.\w{2,4}$", "", name)


def _same_bytes(sets: list[tuple[str, VideoSet]], paths: list[Path], workers: int) -> Iterator[Problem]:
    """Report files of equal content, within a split and across splits."""
    places = defaultdict(list)
    for split, videos in sets:
        for item in videos.items:
            places[item.path].append((split, item.name))
    groups = equal_files(paths, workers)
    together = {path for group in groups for path in group}
    groups += [[path] for path in paths if path not in together and len(places[path]) > 1]
    leaks, copies = [], []
    for group in groups:
        where = [place for path in group for place in places[path]]
        text = " = ".join(f"{split} {name}" for split, name in where)
        (leaks if len({split for split, _ in where}) > 1 else copies).append(text)
    if leaks:
        yield Problem("error", f"files that are in two splits, byte for byte: {len(leaks)}", tuple(leaks))
    if copies:
        yield Problem("warning", f"files that are there more than once, byte for byte: {len(copies)}", tuple(copies))


def equal_files(paths: Iterable[Path], workers: int) -> list[list[Path]]:
    """Return the groups of files with equal content, using `workers` threads; unique files are left out.

    Only files of equal size are opened, and only those with equal first bytes are read completely. Raises OSError for a
    file that cannot be read.
    """
    groups = [list(paths)]
    for key in (_size, _beginning, _content):
        flat = [path for group in groups for path in group]
        values = dict(zip(flat, in_order(key, flat, workers), strict=True))
        groups = [same for group in groups for same in _by(values, group) if len(same) > 1]
    return groups


def _by(values: dict[Path, object], group: list[Path]) -> list[list[Path]]:
    same = defaultdict(list)
    for path in group:
        same[values[path]].append(path)
    return list(same.values())


def _size(path: Path) -> int:
    return path.stat().st_size


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.sha256(file.read(_HEAD_BYTES)).digest()


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _table(splits: list[SplitReport], most: int) -> list[str]:
    """Describe the splits of one spec in lines: sizes, files, and videos of each class by split."""
    lines = []
    for split in splits:
        classes = sum(count > 0 for count in split.classes.values())
        text = f"{split.listed:,} videos, {split.usable:,} can be used" + (f", {classes} classes" if classes else "")
        published = f" (published: {split.published[0]:,} in {split.published[1]} classes)" if split.published else ""
        lines.append(f"  {split.split}: {text}{published}")
    lines += [f"  note: {note}" for note in dict.fromkeys(note for split in splits for note in split.notes)]
    infos = [info for split in splits for info in split.infos]
    if infos:
        lengths = [info.frames for info in infos]
        lines.append(f"  frames: {min(lengths)} to {max(lengths)}, median {median_low(lengths)}")
        lines.append(f"  frames per second: {_counted(f'{info.fps:.4g}' for info in infos)}")
        lines.append(f"  pictures: {_counted(f'{info.width}x{info.height}' for info in infos)}")
        lines.append(f"  codecs: {_counted(info.codec for info in infos)}")
    names = list(dict.fromkeys(name for split in splits for name in split.classes))
    if names:
        lines.append(f"  videos of each class ({', '.join(split.split for split in splits)}):")
        rows = [f"{name}: {', '.join(str(split.classes.get(name, 0)) for split in splits)}" for name in names]
        lines += ["  " + row for row in _first(rows, most)]
    return lines


def _counted(values: Iterable[str]) -> str:
    counts = Counter(values).most_common()
    more = f", and {len(counts) - 6} others" if len(counts) > 6 else ""
    return ", ".join(f"{value} ({count:,})" for value, count in counts[:6]) + more


def _first(lines: Iterable[str], most: int) -> list[str]:
    lines = list(lines)
    cut = len(lines) - most if 0 < most < len(lines) else 0
    return [f"  {line}" for line in lines[: len(lines) - cut]] + ([f"  ... and {cut} more"] if cut else [])
