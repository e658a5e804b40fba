"""The files of a token cache below its index: what it depends on, and the shards that hold its rows.

A shard holds, beside the columns of `larp.data.token_cache.TokenCache`, of each video with rows in it the number, name and
caption (`larp.data.string_columns`), and as metadata the videos that were skipped.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from larp.data.datasets import VideoSet
from larp.data.listing import StoredItems
from larp.data.string_columns import pack_strings, unpack_strings
from larp.files import replacing

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CODE_VERSION = 1
"""Incremented when a change of this code base changes the codes of a video."""
KEY, INDEX = "key.json", "index.json"
STRINGS = ("names", "captions")
COLUMNS = ("codes", "conditions", "labels", "videos", "starts", "flipped", "fps")

_orders: dict[tuple[int, int], dict[int, Tensor]] = {}


class TokenCacheError(ValueError):
    """A token cache that is missing, incomplete, damaged, or made from other data or settings than expected."""


def token_key(
    tokenizer,
    videos: VideoSet,
    split: str,
    stride: int,
    windows: int,
    hop: int | None,
    flips: bool,
    condition_frames: int,
    augmented: int = 0,
) -> dict[str, Any]:
    """Return everything that the codes depend on, as plain values: caches with equal keys hold equal codes.

    The arguments are those of `larp.data.extraction.extract_tokens`.
    """
    config = tokenizer.config
    if isinstance(videos.items, StoredItems):
        described = [videos.items.fingerprint]
    else:
        described = [[item.name, item.label, item.caption, *file_state(item.path)] for item in videos.items]
    described.append(list(videos.classes))
    return {
        "tokenizer": tokenizer.weight_hash(),
        "num_tokens": config.num_tokens,
        "codebook_size": config.codebook_size,
        "data": videos.spec,
        "split": split,
        "videos": f"{len(videos.items)} videos {hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]}",
        "frames": config.num_frames,
        "height": config.height,
        "width": config.width,
        "stride": stride,
        "windows": windows,
        "hop": hop,
        "flips": flips,
        "condition_frames": condition_frames,
        "code_version": CODE_VERSION,
        # Caches of earlier versions have no such entry.
        **({"augmented": augmented} if augmented else {}),
    }


def file_state(path: Path) -> tuple[int, int]:
    """Return size in bytes and modification time in ns of a file, both 0 if it does not exist."""
    # They detect a replaced video, as rsync and make do. Hashing every file would take as long as encoding it.
    try:
        status = path.stat()
    except (OSError, ValueError):
        return 0, 0
    return status.st_size, status.st_mtime_ns


def check_key(found: Mapping[str, Any], expected: Mapping[str, Any], what: str, remedy: str) -> None:
    """Raise TokenCacheError that lists every entry of `expected` from which `found` differs."""
    wrong = [
        f"{name} is {found.get(name)!r}, expected {value!r}"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    if wrong:
        raise TokenCacheError(f"{what} was made from something else: {'; '.join(wrong)}. Remedy: {remedy}")


def shard_slices(videos: int, parts: Sequence[range] | None = None) -> list[range]:
    """Return the videos of each shard of a cache, by their number; any number of ranks can resume with the same shards.

    parts: the videos of each part of the data, such as a tar file. A shard then holds videos of one part, or small parts whole.
    """
    # 1024 shards at most without parts: each process maps those of a large cache.
    size = min(max(videos // 64, 8), max(512, videos // 1024))
    if parts is None:
        return [range(start, min(start + size, videos)) for start in range(0, videos, size)]
    slices: list[range] = []
    for part in parts:
        if slices and len(slices[-1]) + len(part) <= size:
            slices[-1] = range(slices[-1].start, part.stop)
        elif part:
            pieces = -(-len(part) // size)
            ends = [part.start + len(part) * piece // pieces for piece in range(pieces + 1)]
            slices += [range(begin, end) for begin, end in pairwise(ends)]
    return slices


def shard_path(folder: Path, shard: int) -> Path:
    """Return the path of a shard."""
    return folder / f"shard-{shard:05d}.safetensors"


def write_shard(path: Path, tensors: dict[str, Tensor], videos: list[list], skipped: list[list[str]]) -> None:
    """Write a shard atomically. Raises TokenCacheError if it cannot be written.

    Args:
        path: see `shard_path`.
        tensors: columns of `TokenCache` by name.
        videos: [index, name, caption] of each video with rows in this shard, by ascending index.
        skipped: [name, reason] of each video without rows.
    """
    described = {"video_numbers": torch.tensor([number for number, *_ in videos], dtype=torch.int64)}
    for place, column in enumerate(STRINGS, 1):
        packed = pack_strings(video[place] for video in videos)
        described |= dict(zip((column, f"{column}_ends"), packed, strict=True))
    try:
        with replacing(path, sync=True) as part:
            save_file(tensors | described, part, metadata={"skipped": json.dumps(skipped)})
    except OSError as error:
        raise TokenCacheError(
            f"{path} cannot be written ({error.strerror}); the shards before it are whole: make room, and run the extraction "
            "again, which goes on there"
        ) from error


def map_shard(path: Path) -> tuple[dict[str, Tensor], list[list[str]]]:
    """Return all tensors of a shard, memory-mapped, and [name, reason] of its skipped videos.

    Raises TokenCacheError for a damaged file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            if "videos" in notes:  # of earlier versions
                videos = json.loads(notes["videos"])
                tensors["video_numbers"] = torch.tensor([number for number, *_ in videos], dtype=torch.int64)
                for place, column in enumerate(STRINGS, 1):
                    tensors[column], tensors[f"{column}_ends"] = pack_strings(video[place] for video in videos)
            tensors.setdefault("fps", torch.full((len(tensors["codes"]),), torch.nan, dtype=torch.float64))
            return tensors, json.loads(notes["skipped"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> TokenCacheError:
    return TokenCacheError(f"{path}: {error}; delete this file and {INDEX} beside it, and run the extraction again")


def read_shard(path: Path) -> tuple[dict[str, Tensor], dict[str, list]]:
    """Return the columns of a shard, and its `videos` and `skipped`, see `write_shard`. Raises TokenCacheError as `map_shard`."""
    tensors, skipped = map_shard(path)
    every = torch.arange(len(tensors["video_numbers"]))
    try:
        texts = [unpack_strings(tensors[column], tensors[f"{column}_ends"], every) for column in STRINGS]
    except (ValueError, IndexError, KeyError, RuntimeError) as error:
        raise _damaged(path, error) from error
    videos = [list(video) for video in zip(tensors["video_numbers"].tolist(), *texts, strict=True)]
    return {name: tensors[name] for name in COLUMNS if name in tensors}, {"videos": videos, "skipped": skipped}


def count_rows(path: Path) -> int:
    """Return the number of rows of a shard. Raises TokenCacheError for a damaged file."""
    return len(map_shard(path)[0]["codes"])


def nothing_encoded(folder: Path, shards: int) -> list[list[str]]:
    """Return [name, reason] of all videos if all shards exist and none has a row, else an empty list."""
    skipped: list[list[str]] = []
    for path in (shard_path(folder, shard) for shard in range(shards)):
        if not path.is_file():
            return []
        columns, notes = read_shard(path)
        if len(columns["codes"]):
            return []
        skipped += notes["skipped"]
    return skipped


def discard_cache(folder: Path, shards: int) -> None:
    """Remove the files of a cache; the key is removed last, so that an interrupted removal is not taken for no cache."""
    for path in (folder / INDEX, *(shard_path(folder, shard) for shard in range(shards)), folder / KEY):
        path.unlink(missing_ok=True)


def batch_rows(rows: int, step: int, global_batch: int, seed: int) -> Tensor:
    """Return the rows, int64 (global_batch,), of a training step; each epoch has a new order, batches span epochs.

    A function of its arguments only: a resumed run needs only the step, and each rank takes its slice.
    """
    positions = range(step * global_batch, (step + 1) * global_batch)
    return torch.stack([_order(rows, seed, position // rows)[position % rows] for position in positions])


def _order(rows: int, seed: int, epoch: int) -> Tensor:
    """Return the order of an epoch; those of the last epochs are remembered, because they take 8 bytes a row."""
    known = _orders.setdefault((rows, seed), {})
    if epoch not in known:
        mixed = (seed * 0x9E3779B97F4A7C15 + (epoch + 1) * 0xBF58476D1CE4E5B9) % (1 << 63)
        known[epoch] = torch.randperm(rows, generator=torch.Generator().manual_seed(mixed))
        while len(known) > 2:
            del known[next(iter(known))]
    return known[epoch]
