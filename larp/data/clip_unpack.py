"""A pack of clips (larp/data/clip_pack.py) -> a folder of .npy files that needs neither PyAV nor OpenCV to be read."""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

from larp.data.clip_pack import LABELLED, MANIFEST, check_size, cores, json_lines
from larp.data.clips import resize_frames
from larp.data.container import has_pyav
from larp.data.listing import DataError
from larp.data.threads import in_order
from larp.data.video import VideoError, read_video

import numpy as np
from tqdm import tqdm

Decoder = Literal["pyav", "opencv"]

_WHOLE = "unpacked.json"
"""Written last: what a folder was unpacked from."""
_MOST_BYTES = 1 << 28
"""Of one video of a pack."""


@dataclass(frozen=True)
class UnpackReport:
    """What lies in a folder now."""

    clips: int
    frames: int
    fresh: bool
    """False if the folder held the clips of this pack already."""


def unpack_clips(
    pack: str | Path,
    folder: str | Path,
    size: int | None = None,
    workers: int | None = None,
    decoder: Decoder | None = None,
) -> UnpackReport:
    """Write the clips of a pack into a folder, as .npy files, clips.jsonl of all and labelled.jsonl of those with a class.

    Every hash and every number of frames is checked, and the folder appears whole or not at all. A folder that holds
    the same already is left as it is. `size`: pixels along both sides (None: as packed). `workers` threads (None: one
    a core) share the work. `decoder`: PyAV or, where it is missing, OpenCV; both give the same frames. Raises
    DataError for a pack that is cut or damaged, for another folder of that name, and where there is no decoder.
    """
    if size is not None:
        check_size(size)
    pack, folder, decoder = Path(pack), Path(folder), decoder or _decoder()
    try:
        with zipfile.ZipFile(pack) as archive:
            text = archive.read(MANIFEST)
            rows = _rows(pack, text)
            mark = {"pack": hashlib.sha256(text).hexdigest(), "size": size or rows[0]["size"], "clips": len(rows)}
            report = UnpackReport(len(rows), sum(row["frames"] for row in rows), fresh=True)
            if _is_whole(folder, mark, rows):
                return UnpackReport(report.clips, report.frames, fresh=False)
            _check_free(folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
                new = Path(temporary) / "clips"
                work = partial(_unpack, pack=pack, archive=archive, folder=new, size=mark["size"], decoder=decoder)
                done = in_order(work, rows, workers or cores())
                for _ in tqdm(done, total=len(rows), desc="unpacking clips", unit="clip", delay=1):
                    pass
                _write_manifests(new, rows)
                (new / _WHOLE).write_text(json.dumps(mark) + "\n")
                if folder.is_dir():
                    folder.rmdir()  # empty, or it would not have come so far
                new.rename(folder)
    except FileNotFoundError as error:
        raise DataError(f"{error.filename or pack}: no such file") from None
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DataError(
            f"{pack}: is no pack of clips, or one that was cut or damaged: copy it again ({error})"
        ) from None
    return report


def _rows(pack: Path, text: bytes) -> list[dict]:
    """Parse and check the manifest of a pack: nothing of it may lead out of the folder."""
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


def _is_whole(folder: Path, mark: dict, rows: Sequence[dict]) -> bool:
    """Whether a folder was unpacked from this pack at this size, and nothing of it is gone or cut."""
    try:
        if json.loads((folder / _WHOLE).read_text()) != mark:
            return False
        least = mark["size"] ** 2 * 3
        return (folder / MANIFEST).is_file() and all(
            (folder / _frame_file(row)).stat().st_size > row["frames"] * least for row in rows
        )
    except (OSError, ValueError):
        return False


def _check_free(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DataError(f"{folder}: is there already and holds something else: delete it, or choose another folder")


def _unpack(row: dict, pack: Path, archive: zipfile.ZipFile, folder: Path, size: int, decoder: Decoder) -> None:
    """Write the frames of one clip below a folder."""
    name, target = row["path"], folder / _frame_file(row)
    try:
        if archive.getinfo(name).file_size > _MOST_BYTES:
            raise DataError(f"{pack}: {name} is too large for a clip: pack it again")
        video = archive.read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise DataError(f"{pack}: {name} is missing or damaged: copy the pack again ({error})") from None
    if hashlib.sha256(video).hexdigest() != row["sha256"]:
        raise DataError(f"{pack}: {name} has another hash than its line of {MANIFEST}: copy the pack again")
    target.parent.mkdir(parents=True, exist_ok=True)
    file = target.with_suffix(".mp4")
    file.write_bytes(video)
    frames = read_video(file)[0] if decoder == "pyav" else _read_with_opencv(file, row["frames"])
    file.unlink()
    if frames.shape != (row["frames"], row["size"], row["size"], 3):
        raise DataError(f"{pack}: {name} decodes to {frames.shape} where {row['frames']} frames were packed")
    np.save(target, resize_frames(frames, size, size))


def _read_with_opencv(path: Path, frames: int) -> np.ndarray:
    """Read a video, or one frame more than it should have."""
    import cv2

    # One thread each: frame threads hide truncation, and the clips are shared out already.
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


def _write_manifests(folder: Path, rows: Sequence[dict]) -> None:
    left_out = ("path", "size", "sha256")
    lines = [
        {"path": _frame_file(row).as_posix()} | {key: row[key] for key in row if key not in left_out} for row in rows
    ]
    (folder / MANIFEST).write_text(json_lines(lines), encoding="utf-8")
    if labelled := [line for line in lines if "label" in line]:
        (folder / LABELLED).write_text(json_lines(labelled), encoding="utf-8")
