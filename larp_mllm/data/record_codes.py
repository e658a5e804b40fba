"""The videos of records: which files may be read, and a cache of their codes.

folder/<tokenizer and clip>-<videos>.safetensors   codes of up to 64 videos; written whole or not at all
"""

import functools
import hashlib
import json
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from larp.data.clips import ClipShape, frames_to_clip
from larp.data.extraction import read_windows
from larp.data.listing import VideoItem
from larp.data.loader import in_order
from larp.data.stored_video import StoredVideo
from larp.data.tar_index import ShardIndex, open_index
from larp.data.token_cache import CODE_VERSION, file_state
from larp.data.video import ShortVideoError, VideoError, frame_times, read_clip
from larp.files import replacing, user_path
from larp.models.tokenizer import LarpTokenizer

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

# FFmpeg takes a name before a colon for a protocol, such as concat: or http:.
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_CHUNK = 64
"""Videos in one file, and the most that are encoded again after an interruption."""
_BATCH = 8
"""Clips in one pass of the tokenizer."""
_WORKERS = 2


@dataclass(frozen=True)
class Excerpt:
    """A clip of a video: from `start` seconds on, or its middle if that is None."""

    path: Path | StoredVideo
    start: float | None


def find_video(name: object, root: Path | ShardIndex, allow_outside: bool, where: str) -> Path | StoredVideo:
    """Return the video that a record names relative to `root`, with links and .. resolved: a file, or SHARD.tar/MEMBER.

    A record that holds its videos has a StoredVideo in place of a name, which is returned. If `root` is a shard, such as a remote
    one, only its members are found.

    Raises ValueError, naming `where`, for anything but a file name, for a URL or another protocol, for a file outside of
    `root` unless `allow_outside`, and for a missing file.
    """
    if isinstance(name, StoredVideo):
        return name
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ValueError(f"{where}: a video must be the name of a file, got {name!r}")
    if _PROTOCOL.match(name):
        raise ValueError(
            f"{where}: {name} looks like a URL or protocol, and none is opened: download the video and name the file "
            f"(./{name} if the file has this name)"
        )
    if isinstance(root, ShardIndex):
        if (row := root.rows.get(posixpath.normpath(name))) is None:
            raise ValueError(f"{where}: there is no video {name} in {root.shard}: name a member of this shard")
        return root.member(row)
    try:
        base = root.resolve()
        path = (base / user_path(name)).resolve()
        inside, there = path.is_relative_to(base), path.is_file()
        member = None if there or not (inside or allow_outside) else _find_member(path)
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, names too long
        raise ValueError(f"{where}: {name} cannot be found ({error}): give the name of a video file") from None
    if not inside and not allow_outside:
        raise ValueError(
            f"{where}: {name} lies at {path}, outside of the data root {base}: move it there, set --data-root to a folder "
            "that holds it, or allow videos outside with --allow-outside"
        )
    if member is not None:
        return member
    if not there:
        raise ValueError(
            f"{where}: there is no video file {path}: names are relative to {base} (--data-root changes it)"
        )
    return path


def _find_member(path: Path) -> StoredVideo | None:
    """Return the video at SHARD.tar/MEMBER; None if there is no such shard or member."""
    shard = next((parent for parent in path.parents if parent.suffix == ".tar" and parent.is_file()), None)
    if shard is None:
        return None
    index = _index(str(shard), shard.stat().st_mtime_ns)
    row = index.rows.get(path.relative_to(shard).as_posix())
    return None if row is None else index.member(row)


@functools.lru_cache(maxsize=8)
def _index(shard: str, mtime_ns: int) -> ShardIndex:
    return open_index(shard)


def encode_excerpts(
    excerpts: Iterable[Excerpt], tokenizer: LarpTokenizer, cache: Path, stride: int
) -> tuple[dict[Excerpt, Tensor], dict[Excerpt, str]]:
    """Return (codes int (N,) of each readable excerpt, reason and remedy for each of the others).

    Args:
        tokenizer: on the device to encode on.
        cache: folder of the files. Codes found there are reused unless the video or the tokenizer has changed.
        stride: every n-th frame of the file is a frame of the clip.

    Raises ValueError if the folder cannot be written to, or if a file in it is damaged.
    """
    shape = ClipShape(*tokenizer.config.clip_shape, stride)
    made_with = [tokenizer.weight_hash(), CODE_VERSION, stride, *tokenizer.config.clip_shape]
    prefix = _digest(made_with)
    codes = _read_cache(cache, prefix)
    keys = {excerpt: _digest([str(excerpt.path), excerpt.start, *file_state(excerpt.path)]) for excerpt in excerpts}
    missing = [excerpt for excerpt, key in keys.items() if key not in codes]
    reasons: dict[Excerpt, str] = {}
    with tqdm(total=len(missing), desc="encoding videos of records", unit="video", delay=1) as bar:
        for first in range(0, len(missing), _CHUNK):
            chunk = missing[first : first + _CHUNK]
            found = {}
            for excerpt, row in _encode(chunk, tokenizer, shape):
                if isinstance(row, Tensor):
                    found[keys[excerpt]] = row
                else:
                    reasons[excerpt] = f"{row}: {_remedy(row, excerpt, shape.span, stride)}, or leave the record out"
                bar.update()
            if found:
                _write_cache(cache / f"{prefix}-{_digest(sorted(found))}.safetensors", found)
            codes |= found
    return {excerpt: codes[key] for excerpt, key in keys.items() if key in codes}, reasons


def _encode(excerpts: list[Excerpt], tokenizer: LarpTokenizer, shape: ClipShape):
    """Yield (excerpt, its codes or its VideoError)."""
    device = next(tokenizer.parameters()).device
    small = torch.int16 if tokenizer.codebook_size <= 2**15 else torch.int32
    waiting: list[tuple[Excerpt, Tensor]] = []
    clips = in_order(lambda excerpt: _clip_or_error(excerpt, shape), excerpts, _WORKERS)
    for number, (excerpt, clip) in enumerate(zip(excerpts, clips, strict=True), 1):
        if isinstance(clip, VideoError):
            yield excerpt, clip
        else:
            waiting.append((excerpt, clip))
        if waiting and (len(waiting) == _BATCH or number == len(excerpts)):
            encoded = tokenizer.encode(torch.stack([clip for _, clip in waiting]).to(device)).cpu().to(small)
            yield from zip([excerpt for excerpt, _ in waiting], encoded, strict=True)
            waiting = []


def _clip_or_error(excerpt: Excerpt, shape: ClipShape) -> Tensor | VideoError:
    try:
        if excerpt.start is None:
            return read_windows(VideoItem(excerpt.path, excerpt.path.name), shape, 1)[0].clip
        first = frame_times(excerpt.path).at(excerpt.start)
        frames = read_clip(excerpt.path, first, shape.frames, shape.stride)
        return frames_to_clip(frames, shape.height, shape.width)
    except VideoError as error:
        return error


def _remedy(error: VideoError, excerpt: Excerpt, span: int, stride: int) -> str:
    if not isinstance(error, ShortVideoError):
        return "repair the video"
    ways = ['lower its "start"'] if excerpt.start and error.frames >= span else []
    return " or ".join([*ways, *(["lower --stride"] if stride > 1 else [])]) or "give a longer video"


def _read_cache(folder: Path, prefix: str) -> dict[str, Tensor]:
    codes: dict[str, Tensor] = {}
    for path in sorted(folder.glob(f"{prefix}-*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                rows, keys = file.get_tensor("codes"), json.loads(file.metadata()["videos"])
            codes |= zip(keys, rows, strict=True)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): delete this file; its videos are then encoded again"
            ) from error
    return codes


def _write_cache(path: Path, codes: dict[str, Tensor]) -> None:
    try:
        with replacing(path) as part:
            save_file({"codes": torch.stack(list(codes.values()))}, part, metadata={"videos": json.dumps(list(codes))})
    except OSError as error:
        raise ValueError(
            f"the codes of videos cannot be written to {path.parent} ({error.strerror}): choose another folder"
        ) from error


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:20]
