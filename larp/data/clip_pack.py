"""Clips packed into one small file, to be trained on where there is no room for the videos, or no PyAV.

A pack is a zip file of one small H.264 video per clip and of clips.jsonl, their manifest. Unpacked, it is a folder of
.npy files (larp/data/container.py) with two manifests that the `jsonl:` spec reads: clips.jsonl of all clips, and
labelled.jsonl of those with a class.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from larp.data.clips import resize_frames
from larp.data.datasets import open_videos, split_specs
from larp.data.doctor import equal_files
from larp.data.listing import DataError, NoSplitError, VideoItem
from larp.data.loader import in_order
from larp.data.video import ShortVideoError, VideoError, count_frames, read_video, write_video
from larp.kernels.threads import cores

import numpy as np
from tqdm import tqdm

MANIFEST, LABELLED = "clips.jsonl", "labelled.jsonl"
"""The manifests of all clips and of those with a class; a pack has the first alone."""
_SPLITS = ("train", "validation", "test")
_WITHOUT_SPLITS = re.compile(r"(csv|jsonl|folder):|(?!\w+:)")
"""Specs whose videos are all for training, as far as a manifest does not say otherwise."""
_LEAST_SIZE, _MOST_SIZE = 16, 1024
_CLIP_FRAMES = 16
"""Of the clips that models are trained on, unless they are told otherwise."""
_LEAST_BYTES = 1024
"""Of a clip in a pack; the room for that is asked for before the work, which may run out of room all the same."""


@dataclass(frozen=True)
class PackOptions:
    """How clips are packed; ValueError for values out of range."""

    size: int = 84
    """Pixels along both sides."""
    max_frames: int = 96
    """Of a clip for training: the middle ones of its video."""
    held_out_frames: int = 32
    """Of a clip for validation or test."""
    crf: int = 20
    """x264's quality, from 0 (best) to 51."""

    def __post_init__(self):
        check_size(self.size)
        if min(self.max_frames, self.held_out_frames) < 1:
            raise ValueError(
                f"max_frames and held_out_frames must be at least 1: {self.max_frames}, {self.held_out_frames}"
            )
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf is {self.crf}; it must be from 0 (best) to 51")


@dataclass(frozen=True)
class PackReport:
    """What came into a pack."""

    clips: dict[str, int]
    """By split."""
    frames: int
    bytes: int
    psnr: float
    """dB, mean over clips, of the packed frames against those that were encoded."""
    skipped: tuple[tuple[str, str], ...]
    """(name, reason) of videos that cannot be read, or are copies of videos of another split."""
    short: tuple[str, ...]
    """Names of clips with fewer frames than models are trained on (16)."""


def pack_clips(
    specs: Sequence[str],
    out: str | Path,
    options: PackOptions | None = None,
    workers: int | None = None,
    more: Sequence[str] = (),
) -> PackReport:
    """Write the clips of data specs to one file, and return what is in it.

    Frames are resized and cropped as `resize_frames` does. Videos keep the split that their lists or manifest give
    them; those of a folder, or of a manifest without splits, are all for training. Of UCF-101's training list, one
    group of each class (the last) is for validation. Of `more`, further specs, the training videos are taken, without their
    classes: for tokenizers, which need no class, beside generators, which know those of `specs`. A video that is, byte for
    byte, one of another split too is left out of training (and of validation, if it is one for test). `workers` threads
    (None: one a core) share the work. The file appears under its name once it is whole. Raises DataError for a spec that
    cannot be used, for two videos of one name and for a file that cannot be written, VideoError if no video can be read,
    NoPyAVError without PyAV.
    """
    options = options or PackOptions()
    out, workers = Path(out), thread_count(workers)
    entries, skipped = _without_leaks(_entries(specs, more), workers)
    if out.is_dir():
        raise DataError(f"{out}: is a folder: give the name of a file")
    make_room(out, _LEAST_BYTES * len(entries))
    rows, errors = [], []
    handle, temporary = tempfile.mkstemp(prefix=".writing-", suffix=".clips", dir=out.parent)
    try:
        # Deflated, because the tables and the encoder's signature are a tenth of so small a video.
        with (
            os.fdopen(handle, "wb") as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as pack,
            closing(in_order(partial(_encode, options=options), entries, workers)) as encoded,
        ):
            for entry, (row, video, error) in zip(
                entries, tqdm(encoded, total=len(entries), desc="packing clips", unit="clip", delay=1), strict=True
            ):
                if isinstance(error, str):
                    skipped.append((entry["name"], error))
                    continue
                pack.writestr(zipfile.ZipInfo(row["path"]), video, zipfile.ZIP_DEFLATED)
                rows.append(row)
                errors.append(error)
            if not rows:
                raise VideoError(f"none of {len(entries)} videos can be packed; the first, {': '.join(skipped[0])}")
            pack.writestr(zipfile.ZipInfo(MANIFEST), json_lines(rows), zipfile.ZIP_DEFLATED)
        os.chmod(temporary, 0o644)
        os.replace(temporary, out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {(error.strerror or str(error)).lower()}") from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
    return PackReport(
        dict(Counter(row["split"] for row in rows)),
        sum(row["frames"] for row in rows),
        out.stat().st_size,
        sum(errors) / len(errors),
        tuple(skipped),
        tuple(row["path"] for row in rows if row["frames"] < _CLIP_FRAMES),
    )


def check_size(size: int) -> None:
    """ValueError for pixels along both sides that no pack has."""
    if not _LEAST_SIZE <= size <= _MOST_SIZE:
        raise ValueError(f"size is {size}; it must be from {_LEAST_SIZE} to {_MOST_SIZE}")


def json_lines(rows: Sequence[dict]) -> str:
    """The text of a manifest."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def thread_count(workers: int | None) -> int:
    """How many threads share the work: as many as this process has cores if None; ValueError for fewer than one."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; at least one thread is needed")
    return workers or cores()


def make_room(out: Path, size: int) -> None:
    """Make the folder that `out` will lie in; DataError if nothing can be written there, or not `size` bytes."""
    folder = out.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        free = shutil.disk_usage(folder).free
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"{out}: cannot be written: {error.filename} is a file, no folder") from None
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror.lower()} ({folder})") from None
    if free < size:
        raise DataError(f"{out}: needs {size / 1e6:,.1f} MB, and {folder} has {free / 1e6:,.1f} MB left: free space")


# What goes into a pack


def _entries(specs: Sequence[str], more: Sequence[str]) -> list[dict]:
    """One dict for each video: its item's facts, `file` and `name`, and `path`, its name within the pack."""
    entries, paths = [], {}
    wanted = [(part, unlabelled) for group, unlabelled in ((specs, False), (more, True)) for given in group
              for part in split_specs(given)]  # fmt: skip
    for spec, unlabelled in wanted:
        for item, split, label in _listed(spec):
            if unlabelled and split != "train":
                continue
            label = None if unlabelled else label
            path = re.sub(r"[^\w./-]+", "_", str(PurePosixPath(item.name).with_suffix(""))).strip("./") + ".mp4"
            if path in paths:
                raise DataError(
                    f"{spec}: {item.path} would be packed under the name of {paths[path]}: {path}; rename one"
                )
            paths[path] = item.path
            facts = {"label": label, "caption": item.caption, "split": split, "group": item.group}
            entries.append({"path": path, "name": item.name, "file": item.path, **facts})
    return entries


def _without_leaks(entries: list[dict], workers: int) -> tuple[list[dict], list[tuple[str, str]]]:
    """Leave out files that are, byte for byte, one of a later split too: the entries, and (name, reason) of the others."""
    paths = dict.fromkeys(entry["file"] for entry in entries if entry["file"].is_file())
    content = {path: same[0] for same in equal_files(paths, workers) for path in same}
    owners, kept, left_out = {}, [], []
    for entry in sorted(entries, key=lambda entry: _SPLITS.index(entry["split"])):
        owners[content.get(entry["file"], entry["file"])] = entry
    for entry in entries:
        owner = owners[content.get(entry["file"], entry["file"])]
        if owner["split"] == entry["split"]:
            kept.append(entry)
        else:
            reason = f"the {entry['split']} video is {owner['name']} of split {owner['split']}, byte for byte"
            left_out.append((entry["name"], reason))
    return kept, left_out


def _listed(spec: str) -> Iterator[tuple[VideoItem, str, str | None]]:
    """The videos of one spec, each with its split and the name of its class."""
    found: list[tuple[VideoItem, str]] = []
    if _WITHOUT_SPLITS.match(spec):
        videos = open_videos(spec, "all")
        found = [(item, item.split or "train") for item in videos.items]
    else:
        for split in _SPLITS:
            with suppress(NoSplitError):
                videos = open_videos(spec, split)
                found += [(item, split) for item in videos.items]
    last: dict[int, str] = {}
    if spec.startswith("ucf101:"):
        for item, split in found:
            if split == "train" and item.group:
                last[item.label] = max(item.group, last.get(item.label, ""))
    for item, split in found:
        held_out = split == "train" and item.group is not None and item.group == last.get(item.label)
        yield item, "validation" if held_out else split, None if item.label is None else videos.classes[item.label]


def _encode(entry: dict, options: PackOptions) -> tuple[dict | None, bytes, float | str]:
    """Encode one clip: its row of the manifest, the video file, and its PSNR; or None, and why it cannot be read."""
    most = options.max_frames if entry["split"] == "train" else options.held_out_frames
    try:
        frames, fps = _middle(entry["file"], most)
    except VideoError as error:
        return None, b"", str(error).removeprefix(f"{entry['file']}: ")
    frames = resize_frames(frames, options.size, options.size)
    with tempfile.TemporaryDirectory(prefix="larp-pack-") as folder:
        path = Path(folder) / "clip.mp4"
        # Colour at full size and tuning for the pixels: about 2 dB more at the same number of bytes.
        write_video(path, frames, fps, quality=options.crf, pixel_format="yuv444p", preset="veryslow", tune="psnr")
        video, (again, _) = path.read_bytes(), read_video(path)
    if again.shape != frames.shape:
        raise VideoError(f"{entry['file']}: {frames.shape} frames came back from the encoder as {again.shape}")
    row = {key: entry[key] for key in ("path", "label", "caption", "split", "group") if entry[key] is not None}
    row |= {"fps": round(fps, 3), "frames": len(frames), "size": options.size}
    return row | {"sha256": hashlib.sha256(video).hexdigest()}, video, _psnr(frames, again)


def _middle(path: Path, most: int) -> tuple[np.ndarray, float]:
    """Read the middle frames of a video, `most` at most, whatever its header promises."""
    held = count_frames(path)
    try:
        return read_video(path, max(0, held - most) // 2, min(held, most))
    except ShortVideoError as error:
        held = error.frames
        return read_video(path, max(0, held - most) // 2, min(held, most))


def _psnr(frames: np.ndarray, others: np.ndarray) -> float:
    squares = float(np.square(frames.astype(np.float32) - others).mean())
    return 10 * math.log10(255**2 / max(squares, 1e-2))
