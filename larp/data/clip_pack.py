"""Packs the clips of data sets into one small file, for training where the videos do not fit or PyAV is missing.

A pack is a zip file that holds one H.264 video per clip and their manifest, clips.jsonl. Unpacked, it is a folder of
.npy files (larp/data/open_video.py) with two manifests for the `jsonl:` spec: clips.jsonl lists all clips, and
labelled.jsonl those with a class.
"""

from __future__ import annotations

import hashlib
import json
import math
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
from larp.files import replacing
from larp.kernels.threads import cores

import numpy as np
from tqdm import tqdm

MANIFEST, LABELLED = "clips.jsonl", "labelled.jsonl"
"""Manifests of all clips and of the labelled ones; a pack holds the first only."""
_SPLITS = ("train", "validation", "test")
_WITHOUT_SPLITS = re.compile(r"(csv|jsonl|folder):|(?!\w+:)")
"""Specs whose videos are all training videos unless a manifest assigns splits."""
_MIN_SIZE, _MAX_SIZE = 16, 1024
_CLIP_FRAMES = 16
"""Default clip length of the models."""
_MIN_BYTES = 1024
"""Lower bound of the size of a packed clip, for the check of free disk space before packing."""


@dataclass(frozen=True)
class PackOptions:
    """How clips are packed. Raises ValueError for values out of range."""

    size: int = 84
    """Height and width in pixels."""
    max_frames: int = 96
    """Maximum frames of a training clip, taken from the middle of its video."""
    held_out_frames: int = 32
    """Maximum frames of a validation or test clip."""
    crf: int = 20
    """x264's constant rate factor, from 0 (best) to 51."""

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
    """The contents of a pack."""

    clips: dict[str, int]
    """Number of clips by split."""
    frames: int
    bytes: int
    psnr: float
    """PSNR in dB of the packed frames against the frames before encoding, mean over clips."""
    skipped: tuple[tuple[str, str], ...]
    """(name, reason) of videos that cannot be read or duplicate a video of another split."""
    short: tuple[str, ...]
    """Names of clips shorter than the default clip length of the models (16 frames)."""


def pack_clips(
    specs: Sequence[str],
    out: str | Path,
    options: PackOptions | None = None,
    workers: int | None = None,
    more: Sequence[str] = (),
) -> PackReport:
    """Write the clips of data specs to one file and return its contents.

    Frames are resized and cropped by `resize_frames`. Videos keep the split of their list or manifest; videos of a
    folder, or of a manifest without splits, are training videos. The last group of each class in UCF-101's training
    list becomes validation data. A video that is byte-identical to one of a later split (train, validation, test) is
    left out. The file appears under its name only when it is complete.

    Args:
        specs: data specs, see `larp.data.datasets`.
        out: path of the pack.
        options: size, length and quality of the clips.
        workers: threads; None uses one per core.
        more: further specs, of which only the training videos are packed, without labels: extra data for a tokenizer.

    Raises DataError for an unusable spec, two videos of one name or a file that cannot be written, VideoError if no
    video can be read, and NoPyAVError without PyAV.
    """
    options = options or PackOptions()
    out, workers = Path(out), thread_count(workers)
    entries, skipped = _without_leaks(_entries(specs, more), workers)
    if out.is_dir():
        raise DataError(f"{out}: is a folder: give the name of a file")
    make_room(out, _MIN_BYTES * len(entries))
    rows, errors = [], []
    try:
        # Deflated: the container's tables and the encoder's signature are a tenth of such a small file.
        with (
            replacing(out) as part,
            zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as pack,
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
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {(error.strerror or str(error)).lower()}") from error
    return PackReport(
        dict(Counter(row["split"] for row in rows)),
        sum(row["frames"] for row in rows),
        out.stat().st_size,
        sum(errors) / len(errors),
        tuple(skipped),
        tuple(row["path"] for row in rows if row["frames"] < _CLIP_FRAMES),
    )


def check_size(size: int) -> None:
    """Raise ValueError unless `size`, in pixels, is a valid height and width of packed clips."""
    if not _MIN_SIZE <= size <= _MAX_SIZE:
        raise ValueError(f"size is {size}; it must be from {_MIN_SIZE} to {_MAX_SIZE}")


def json_lines(rows: Sequence[dict]) -> str:
    """Return rows as JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def thread_count(workers: int | None) -> int:
    """Return the number of threads, by default one per core. Raises ValueError for fewer than one."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; at least one thread is needed")
    return workers or cores()


def make_room(out: Path, size: int) -> None:
    """Create the parent folder of `out`. Raises DataError if it cannot hold `size` more bytes."""
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


def _entries(specs: Sequence[str], more: Sequence[str]) -> list[dict]:
    """Return a dict per video: label, caption, split, group, `file` and `name`, and `path`, its name in the pack."""
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
            fields = {"label": label, "caption": item.caption, "split": split, "group": item.group}
            entries.append({"path": path, "name": item.name, "file": item.path, **fields})
    return entries


def _without_leaks(entries: list[dict], workers: int) -> tuple[list[dict], list[tuple[str, str]]]:
    """Return the entries without files that duplicate one of a later split, and (name, reason) of the removed ones."""
    paths = dict.fromkeys(entry["file"] for entry in entries if entry["file"].is_file())
    content = {path: same[0] for same in equal_files(paths, workers) for path in same}
    owners, selected, removed = {}, [], []
    for entry in sorted(entries, key=lambda entry: _SPLITS.index(entry["split"])):
        owners[content.get(entry["file"], entry["file"])] = entry
    for entry in entries:
        owner = owners[content.get(entry["file"], entry["file"])]
        if owner["split"] == entry["split"]:
            selected.append(entry)
        else:
            reason = f"the {entry['split']} video is {owner['name']} of split {owner['split']}, byte for byte"
            removed.append((entry["name"], reason))
    return selected, removed


def _listed(spec: str) -> Iterator[tuple[VideoItem, str, str | None]]:
    """Yield the videos of one spec, each with its split and class name."""
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
    """Encode one clip: return (manifest row, video bytes, PSNR), or (None, b"", reason) if it cannot be read."""
    limit = options.max_frames if entry["split"] == "train" else options.held_out_frames
    try:
        frames, fps = _read_middle(entry["file"], limit)
    except VideoError as error:
        return None, b"", str(error).removeprefix(f"{entry['file']}: ")
    frames = resize_frames(frames, options.size, options.size)
    with tempfile.TemporaryDirectory(prefix="larp-pack-") as folder:
        path = Path(folder) / "clip.mp4"
        # Full-resolution colour and PSNR tuning gain about 2 dB at the same file size.
        write_video(path, frames, fps, quality=options.crf, pixel_format="yuv444p", preset="veryslow", tune="psnr")
        video, (again, _) = path.read_bytes(), read_video(path)
    if again.shape != frames.shape:
        raise VideoError(f"{entry['file']}: {frames.shape} frames came back from the encoder as {again.shape}")
    row = {key: entry[key] for key in ("path", "label", "caption", "split", "group") if entry[key] is not None}
    row |= {"fps": round(fps, 3), "frames": len(frames), "size": options.size}
    return row | {"sha256": hashlib.sha256(video).hexdigest()}, video, _psnr(frames, again)


def _read_middle(path: Path, limit: int) -> tuple[np.ndarray, float]:
    """Read up to `limit` frames from the middle of a video; retry if it has fewer frames than its header says."""
    count = count_frames(path)
    try:
        return read_video(path, max(0, count - limit) // 2, min(count, limit))
    except ShortVideoError as error:
        count = error.frames
        return read_video(path, max(0, count - limit) // 2, min(count, limit))


def _psnr(frames: np.ndarray, others: np.ndarray) -> float:
    squares = float(np.square(frames.astype(np.float32) - others).mean())
    return 10 * math.log10(255**2 / max(squares, 1e-2))
