"""The token cache: clips are encoded once and trained on many times.

    folder/key.json                  everything that changes a code; written first, for a resumed extraction to compare
    folder/shard-00000.safetensors   rows of a fixed slice of the videos; each file appears whole or not at all
    folder/index.json                written last: the cache is complete

Shapes: M rows (windows of videos), N codes of a clip.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from larp.data.datasets import VideoSet
from larp.files import write_json

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

CODE_VERSION = 1
"""Raised whenever a change of this code base changes the codes that a tokenizer gives for a video."""
KEY, INDEX = "key.json", "index.json"
COLUMNS = ("codes", "conditions", "labels", "videos", "starts", "flipped", "fps")


class TokenCacheError(ValueError):
    """A token cache that is absent, incomplete, damaged, or made from something else than expected."""


@dataclass(frozen=True)
class TokenCache:
    """Codes of many clips, in memory; row i belongs to one window of one video."""

    key: dict[str, Any]
    """What the codes were made from, see `token_key`."""
    codes: Tensor
    """(M, N), int16 or int32."""
    conditions: Tensor | None
    """(M, N) codes of the given frames, repeated to a full clip; None unless extracted with condition frames."""
    labels: Tensor
    """int64 (M,), -1 where the video has none."""
    videos: Tensor
    """int64 (M,), the number of the row's video in the data set."""
    starts: Tensor
    """int64 (M,), the first frame of the window."""
    flipped: Tensor
    """bool (M,), mirrored left to right."""
    fps: Tensor
    """float64 (M,), frames per second of the clip: those of its file over the stride; NaN in caches older than this."""
    names: tuple[str, ...]
    """Names of the videos, one for each row."""
    captions: tuple[str | None, ...]
    """Captions of the videos, one for each row."""
    classes: tuple[str, ...]
    """Class names in the order of the labels; empty if the data has none."""
    skipped: tuple[tuple[str, str], ...]
    """(name, reason) of videos that could not be read."""
    tokenizer: str
    """The path or hub name of the tokenizer, as it was given."""
    variant: str | None = None
    """Which of its weights, see `larp.hub.LarpModel.from_pretrained`."""
    folder: Path | None = None
    """Where the cache was opened, for messages."""

    @classmethod
    def open(cls, folder: str | Path, expect: Mapping[str, Any] | None = None) -> "TokenCache":
        """Read a finished cache.

        Args:
            folder: where `larp.data.extraction` wrote it.
            expect: parts of the key that must hold, for example {"tokenizer": tokenizer.weight_hash()}.

        Raises TokenCacheError if the cache is absent, unfinished or damaged, or differs from `expect`, or was made by a
        version of this code that gave other codes; it says in what.
        """
        folder = Path(folder)
        if not (folder / INDEX).is_file():
            if (folder / KEY).is_file():
                raise TokenCacheError(f"{folder} is unfinished: run the extraction again, it goes on where it stopped")
            raise TokenCacheError(f"{folder} holds no token cache: make one with training/extract_tokens.py")
        index = read_index(folder)
        check_key(
            {"code_version": 1} | index["key"],
            {"code_version": CODE_VERSION} | dict(expect or {}),
            f"the token cache {folder}",
            "extract the tokens again, into another folder",
        )
        shards = [
            read_shard(folder / name)
            for name in tqdm(index["shards"], desc="tokens", disable=len(index["shards"]) < 200)
        ]
        for tensors, _ in shards:
            tensors.setdefault("fps", torch.full((len(tensors["codes"]),), torch.nan, dtype=torch.float64))
        columns = {
            name: torch.cat([tensors[name] for tensors, _ in shards]) for name in COLUMNS if name in shards[0][0]
        }
        described = {number: video for _, notes in shards for number, *video in notes["videos"]}
        rows = columns["videos"].tolist()
        return cls(
            key=index["key"],
            conditions=columns.pop("conditions", None),
            **columns,
            names=tuple(described[number][0] for number in rows),
            captions=tuple(described[number][1] for number in rows),
            classes=tuple(index["classes"]),
            skipped=tuple(tuple(pair) for _, notes in shards for pair in notes["skipped"]),
            tokenizer=index["tokenizer"],
            variant=index.get("variant"),
            folder=folder,
        )

    def __len__(self) -> int:
        """M."""
        return len(self.codes)

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.key["num_tokens"]

    @property
    def codebook_size(self) -> int:
        """K."""
        return self.key["codebook_size"]

    def frame_rate(self, default: float) -> float:
        """Return the frames per second that most clips have; `default` for an old cache, which does not know it."""
        known = self.fps[~self.fps.isnan()]
        return known.mode().values.item() if len(known) else default

    def load_tokenizer(self, path: str | Path | None = None, device: torch.device | str = "cpu"):
        """Load the LarpTokenizer that made the codes, in its variant, from `path` or from where it lay then.

        Raises CheckpointError if `path` holds none; TokenCacheError if another one lies there, or none where it lay.
        """
        from larp.hub import CheckpointError
        from larp.models.tokenizer import LarpTokenizer

        where = self.folder or "the token cache"
        try:
            tokenizer = LarpTokenizer.from_pretrained(path or self.tokenizer, device=device, variant=self.variant)
        except CheckpointError as error:
            if path:
                raise
            raise TokenCacheError(
                f"{where} names its tokenizer as it was typed then: {error}; give --tokenizer"
            ) from error
        check_key(
            self.key,
            {"tokenizer": tokenizer.weight_hash()},
            f"the token cache {where}",
            "give the --tokenizer that it was made with, or extract the tokens again",
        )
        return tokenizer

    def select(self, rows: Tensor) -> "TokenCache":
        """Return the cache of some rows, int64 (m,)."""
        chosen = rows.tolist()
        columns = {name: getattr(self, name)[rows] for name in COLUMNS if getattr(self, name) is not None}
        names, captions = tuple(self.names[i] for i in chosen), tuple(self.captions[i] for i in chosen)
        return replace(self, **columns, names=names, captions=captions)

    def batch(self, rows: Tensor, task: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return codes int64 (b, N) and the generator's condition of some rows.

        The condition is labels (b,) for the task "class", or the given codes and the separator (b, N + 1).
        """
        codes = self.codes[rows].long().to(device)
        if task == "class":
            return codes, self.labels[rows].to(device)
        return codes, with_separator(self.conditions[rows].long().to(device), self.codebook_size)

    def require(self, task: str, where: str, classes: tuple[str, ...] | None = None) -> None:
        """Raise TokenCacheError if the cache lacks what a generator's task needs: a class for each clip, or conditions.

        `where` names the data in the message; `classes` are the class names that the cache must have.
        """
        if task == "frame-prediction":
            if self.conditions is None:
                raise TokenCacheError(f"{where} holds no codes of given frames: extract with --condition-frames 5")
            return
        lacking = int((self.labels < 0).sum())
        if lacking or not self.classes:
            raise TokenCacheError(
                f"{where}: {lacking} of {len(self)} clips have no class. Data with classes: ucf101:ROOT, shapes:, k600:"
                " and csv: or jsonl: manifests with a label for every video; or train with --task frame-prediction"
            )
        if classes is not None and self.classes != classes:
            missing, extra = sorted(set(classes) - set(self.classes))[:5], sorted(set(self.classes) - set(classes))[:5]
            raise TokenCacheError(
                f"{where} has other classes than the training data: missing {missing or 'none'}, unknown"
                f" {extra or 'none'} (or another order)"
            )

    def hold_out(self, every: int = 20) -> tuple["TokenCache", "TokenCache"]:
        """Split off every n-th video with all its windows: (the others, the held-out ones).

        Raises TokenCacheError if there are too few videos for both.
        """
        held = self.videos % every == every - 1
        if held.all() or not held.any():
            raise TokenCacheError(
                f"{self.folder or 'the token cache'} holds {len(self.videos.unique())} videos, too few to hold out one"
                f" in {every}: give a second token cache to validate on with --eval-tokens DIR"
                " (training/extract_tokens.py makes one)"
            )
        return self.select((~held).nonzero()[:, 0]), self.select(held.nonzero()[:, 0])


def with_separator(given: Tensor, codebook_size: int) -> Tensor:
    """Return the condition of frame prediction: codes (b, N) of given frames and the separator, (b, N + 1)."""
    return F.pad(given, (0, 1), value=codebook_size)


def token_key(
    tokenizer,
    videos: VideoSet,
    split: str,
    stride: int,
    windows: int,
    hop: int | None,
    flips: bool,
    condition_frames: int,
) -> dict[str, Any]:
    """Return everything that changes a code, as plain values: two caches with equal keys hold equal codes.

    Args:
        tokenizer: a LarpTokenizer.
        videos, split: the data and the split that it was opened with.
        stride, windows, hop, flips, condition_frames: as in `larp.data.extraction.extract_tokens`.
    """
    config = tokenizer.config
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
    }


def file_state(path: Path) -> tuple[int, int]:
    """Return the size in bytes and the modification time in ns of a file, both 0 if there is none."""
    # A video replaced under its old name gives other codes. Reading every file to hash it would take as long as
    # encoding does; size and time are what rsync and make go by.
    try:
        found = path.stat()
    except (OSError, ValueError):
        return 0, 0
    return found.st_size, found.st_mtime_ns


def check_key(found: Mapping[str, Any], expected: Mapping[str, Any], what: str, remedy: str) -> None:
    """Raise TokenCacheError that lists every expected part of a key which is found otherwise."""
    wrong = [
        f"{name} is {found.get(name)!r}, expected {value!r}"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    if wrong:
        raise TokenCacheError(f"{what} was made from something else: {'; '.join(wrong)}. Remedy: {remedy}")


def shard_slices(videos: int) -> list[range]:
    """Return which videos each shard holds: a function of their number only, so that any number of ranks can resume."""
    size = min(max(videos // 64, 8), 512)
    return [range(start, min(start + size, videos)) for start in range(0, videos, size)]


def shard_path(folder: Path, shard: int) -> Path:
    """Return the file of a shard."""
    return folder / f"shard-{shard:05d}.safetensors"


def write_shard(path: Path, tensors: dict[str, Tensor], videos: list[list], skipped: list[list[str]]) -> None:
    """Write a shard, whole or not at all.

    Args:
        tensors: the columns of `TokenCache`, by name.
        videos: [number, name, caption] of each video with rows in this shard.
        skipped: [name, reason] of each video without.
    """
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"videos": json.dumps(videos), "skipped": json.dumps(skipped)})
    os.replace(part, path)


def read_shard(path: Path) -> tuple[dict[str, Tensor], dict[str, list]]:
    """Read the columns of a shard and its notes (videos, skipped); TokenCacheError if the file is damaged or gone."""
    try:
        with safe_open(path, framework="pt") as file:
            notes = {name: json.loads(text) for name, text in file.metadata().items() if name in ("videos", "skipped")}
            return {name: file.get_tensor(name) for name in file.keys()}, notes  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise TokenCacheError(
            f"{path}: {error}; delete this file and {INDEX} beside it, and run the extraction again"
        ) from error


def begin_cache(folder: Path, key: dict[str, Any]) -> None:
    """Make the folder and note the key.

    TokenCacheError if the folder was begun with another key, or cannot be made or written to.
    """
    try:
        if (folder / KEY).is_file():
            check_key(
                read_json(folder / KEY),
                key,
                f"{folder} was begun before and",
                "choose another --out, or delete the folder (`videos` stands for the names, labels, captions and files;"
                " a file that was replaced or touched counts as another)",
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / KEY, key)
    except OSError as error:
        raise TokenCacheError(f"no token cache can be written to {folder} ({error}): choose another --out") from error


def nothing_encoded(folder: Path, shards: int) -> list[list[str]]:
    """Return [name, reason] of all videos if all shards are there and hold no row; else an empty list."""
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
    """Remove the files of a cache; the key goes last, so that a removal that is cut short can be told from no cache."""
    for path in (folder / INDEX, *(shard_path(folder, shard) for shard in range(shards)), folder / KEY):
        path.unlink(missing_ok=True)


def finish_cache(
    folder: Path,
    key: dict[str, Any],
    classes: tuple[str, ...],
    tokenizer: str,
    shards: int,
    variant: str | None = None,
) -> None:
    """Write the index, which marks the cache as complete; every shard must be there."""
    paths = [shard_path(folder, shard) for shard in range(shards)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise TokenCacheError(
            f"{folder}: {len(missing)} shards are missing ({missing[0]}, ...): run the extraction again"
        )
    index = {"key": key, "classes": list(classes), "tokenizer": tokenizer, "variant": variant}
    write_json(folder / INDEX, index | {"shards": [path.name for path in paths]})


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; TokenCacheError names a damaged file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenCacheError(f"{path} cannot be read ({error}): extract the tokens again") from error


def read_index(folder: Path) -> dict[str, Any]:
    """Read the index of a finished cache; TokenCacheError says what a damaged one lacks."""
    index, kinds = read_json(folder / INDEX), {"key": dict, "classes": list, "tokenizer": str, "shards": list}
    found = index if isinstance(index, dict) else {}
    if lacking := [name for name, kind in kinds.items() if not isinstance(found.get(name), kind)]:
        lacks = f"{folder / INDEX} is damaged: it lacks {', '.join(lacking)}"
        raise TokenCacheError(f"{lacks}; delete this file, and run the extraction again")
    return found


def batch_rows(rows: int, step: int, global_batch: int, seed: int) -> Tensor:
    """Return the rows int64 (global_batch,) of a training step: each epoch is a new order, batches run across epochs.

    A function of its arguments only, so that resuming needs no more than the step, and ranks just take their slices.
    """
    positions = range(step * global_batch, (step + 1) * global_batch)
    return torch.stack([_order(rows, seed, position // rows)[position % rows] for position in positions])


@functools.lru_cache(maxsize=8)
def _order(rows: int, seed: int, epoch: int) -> Tensor:
    mixed = (seed * 0x9E3779B97F4A7C15 + (epoch + 1) * 0xBF58476D1CE4E5B9) % (1 << 63)
    return torch.randperm(rows, generator=torch.Generator().manual_seed(mixed))
