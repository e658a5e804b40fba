"""Unpacks a pack of clips (larp/data/clip_pack.py) into .npy files, which need neither PyAV nor OpenCV to be read."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

from larp.data.clip_pack import LABELLED, MANIFEST, check_size, json_lines, make_room, thread_count
from larp.data.clips import resize_frames
from larp.data.listing import DataError
from larp.data.loader import in_order
from larp.data.open_video import has_pyav
from larp.data.video import VideoError, read_clip

import numpy as np
from tqdm import tqdm

Decoder = Literal["pyav", "opencv"]

_MARKER = "unpacked.json"
"""Written last; holds the hash of the pack and of each unpacked file."""
_MAX_BYTES = 1 << 28
"""Largest video accepted from a pack."""


@dataclass(frozen=True)
class UnpackReport:
    """The contents of an unpacked folder."""

    clips: int
    frames: int
    fresh: bool
    """False if the folder already held the clips of this pack."""
    splits: frozenset[str]
    """Splits that have at least one clip."""


def unpack_clips(
    pack: str | Path,
    folder: str | Path,
    size: int | None = None,
    workers: int | None = None,
    decoder: Decoder | None = None,
) -> UnpackReport:
    """Write the clips of a pack as .npy files, with the manifests clips.jsonl and labelled.jsonl.

    All hashes and frame counts are verified, and the folder is renamed into place only when complete. An existing
    folder with the same contents is verified and left unchanged.

    Args:
        pack: file written by `larp.data.clip_pack.pack_clips`.
        folder: destination; must not exist, be empty, or hold this pack.
        size: height and width in pixels; None leaves clips as packed.
        workers: threads; None uses one per core.
        decoder: by default PyAV, or OpenCV where PyAV is missing; both give the same frames.

    Raises DataError for a damaged pack, a folder with other or changed contents, a full disk and a missing decoder.
    """
    if size is not None:
        check_size(size)
    pack, folder, workers, decoder = Path(pack), Path(folder), thread_count(workers), decoder or _decoder()
    try:
        with zipfile.ZipFile(pack) as archive:
            if min((member.header_offset for member in archive.infolist()), default=0):
                raise DataError(f"{pack}: its beginning is missing, or another file lies before it: copy it again")
            text = archive.read(MANIFEST)
            rows = _rows(pack, text)
            mark = {"pack": hashlib.sha256(text).hexdigest(), "size": size or rows[0]["size"], "clips": len(rows)}
            frames, splits = sum(row["frames"] for row in rows), frozenset(str(row.get("split")) for row in rows)
            if _is_complete(folder, mark, workers):
                return UnpackReport(len(rows), frames, False, splits)
            _check_free(folder)
            make_room(folder, frames * mark["size"] ** 2 * 3)
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
                new = Path(temporary) / "clips"
                work = partial(_unpack, pack=pack, archive=archive, folder=new, size=mark["size"], decoder=decoder)
                with closing(in_order(work, rows, workers)) as done:
                    hashes = dict(tqdm(done, total=len(rows), desc="unpacking clips", unit="clip", delay=1))
                hashes |= _write_manifests(new, rows)
                (new / _MARKER).write_text(json.dumps(mark | {"sha256": hashes}) + "\n")
                if folder.is_dir():
                    folder.rmdir()  # _check_free has shown that it is empty
                try:
                    new.rename(folder)
                except OSError:
                    if not _is_complete(folder, mark, workers):  # else another process was faster
                        raise
    except OSError as error:
        if error.filename is not None and Path(error.filename) == pack:
            raise DataError(f"{pack}: cannot be read: {(error.strerror or str(error)).lower()}") from None
        raise DataError(f"{folder}: cannot be written: {(error.strerror or str(error)).lower()}") from error
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DataError(
            f"{pack}: is no pack of clips, or one that was cut or damaged: copy it again ({error})"
        ) from None
    return UnpackReport(len(rows), frames, True, splits)


def _rows(pack: Path, text: bytes) -> list[dict]:
    """Parse and check the manifest of a pack; paths must stay inside the destination folder."""
    rows = []
    for number, line in enumerate(text.decode("utf-8", errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
            path = PurePosixPath(row["path"])
            safe = path.suffix == ".mp4" and not path.is_absolute() and ".." not in path.parts
            known = isinstance(row["sha256"], str) and all(type(row[key]) is int for key in ("frames", "size"))
            if not (safe and known) or row["frames"] < 1:
                raise ValueError(line[:80])
            check_size(row["size"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{pack}: line {number} of its {MANIFEST} is not as pack-clips writes it: {error}"
            ) from None
        rows.append(row)
    if not rows:
        raise DataError(f"{pack}: holds no clip")
    return rows


def _is_complete(folder: Path, mark: dict, workers: int) -> bool:
    """Whether a folder holds this pack at this size. Raises DataError if one of its files is missing or has changed."""
    try:
        found = json.loads((folder / _MARKER).read_text())
        hashes = found.pop("sha256")
        if found != mark:
            return False
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    with closing(in_order(lambda name: _hash_or_none(folder / name), hashes, workers)) as found:
        for name, digest in zip(hashes, found, strict=True):
            if digest != hashes[name]:
                state = "is gone or cannot be read" if digest is None else "has changed since it was unpacked"
                raise DataError(f"{folder / name}: {state}: delete the folder, and unpack again")
    return True


def _hash_or_none(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _check_free(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DataError(f"{folder}: is there already and holds something else: delete it, or choose another folder")


def _unpack(
    row: dict, pack: Path, archive: zipfile.ZipFile, folder: Path, size: int, decoder: Decoder
) -> tuple[str, str]:
    """Write the frames of one clip below `folder`; return the file's name and hash."""
    name, file = row["path"], folder / row["path"]
    try:
        if archive.getinfo(name).file_size > _MAX_BYTES:
            raise DataError(f"{pack}: {name} is too large for a clip: pack it again")
        video = archive.read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise DataError(f"{pack}: {name} is missing or damaged: copy the pack again ({error})") from None
    if hashlib.sha256(video).hexdigest() != row["sha256"]:
        raise DataError(f"{pack}: {name} has another hash than its line of {MANIFEST}: copy the pack again")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(video)
    frames = read_clip(file) if decoder == "pyav" else _read_with_opencv(file, row["frames"])
    file.unlink()
    if frames.shape != (row["frames"], row["size"], row["size"], 3):
        raise DataError(f"{pack}: {name} decodes to {frames.shape} where {row['frames']} frames were packed")
    content = io.BytesIO()  # np.save to a file hides the reason of a failure
    np.save(content, resize_frames(frames, size, size))
    return _write(folder, _frame_file(row).as_posix(), content.getbuffer())


def _read_with_opencv(path: Path, frames: int) -> np.ndarray:
    """Read up to `frames` + 1 frames, so that the caller detects a video that is too long."""
    import cv2

    # One thread: frame threads hide truncation, and clips are already decoded in parallel.
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    try:
        found = []
        while len(found) <= frames and (picture := capture.read()[1]) is not None:
            found.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
    finally:
        capture.release()
    if not found:
        raise VideoError(f"{path.name}: OpenCV decodes no frame of it: install PyAV (pip install av)")
    return np.stack(found)


def _decoder() -> Decoder:
    if has_pyav():
        return "pyav"
    try:
        import cv2  # noqa: F401
    except ImportError:
        raise DataError("clips are decoded by PyAV or OpenCV: pip install av, or opencv-python-headless") from None
    return "opencv"


def _frame_file(row: dict) -> Path:
    return Path(row["path"]).with_suffix(".npy")


def _write(folder: Path, name: str, content: bytes | memoryview) -> tuple[str, str]:
    (folder / name).write_bytes(content)
    return name, hashlib.sha256(content).hexdigest()


def _write_manifests(folder: Path, rows: Sequence[dict]) -> dict[str, str]:
    """Write the manifests; return their hashes by name."""
    omitted = ("path", "size", "sha256")
    lines = [
        {"path": _frame_file(row).as_posix()} | {key: row[key] for key in row if key not in omitted} for row in rows
    ]
    manifests = {MANIFEST: lines, LABELLED: [line for line in lines if "label" in line]}
    return dict(_write(folder, name, json_lines(listed).encode()) for name, listed in manifests.items() if listed)
