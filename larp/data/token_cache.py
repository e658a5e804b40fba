"""The token cache: the codes of clips, encoded once and read in every epoch.

    folder/key.json                  everything that the codes depend on; written first, compared on resumption
    folder/shard-00000.safetensors   rows of a fixed slice of the videos; written atomically
    folder/index.json                written last; marks the cache as complete

Shapes: M rows (windows of videos), N codes of a clip, K codebook size, b rows of a batch.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from larp.data.datasets import VideoSet
from larp.files import read_json, replacing, write_json

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

CODE_VERSION = 1
"""Incremented when a change of this code base changes the codes of a video."""
KEY, INDEX = "key.json", "index.json"
COLUMNS = ("codes", "conditions", "labels", "videos", "starts", "flipped", "fps")


class TokenCacheError(ValueError):
    """A token cache that is missing, incomplete, damaged, or made from other data or settings than expected."""


@dataclass(frozen=True)
class TokenCache:
    """The codes of many clips, in memory; each row is one window of one video."""

    key: dict[str, Any]
    """What the codes were made from, see `token_key`."""
    codes: Tensor
    """(M, N), int16 or int32."""
    conditions: Tensor | None
    """(M, N) codes of the given frames, padded to a full clip; None if extracted without condition frames."""
    labels: Tensor
    """int64 (M,), -1 where the video has none."""
    videos: Tensor
    """int64 (M,), index of the video in the data set."""
    starts: Tensor
    """int64 (M,), first frame of the window."""
    flipped: Tensor
    """bool (M,), whether the window is mirrored."""
    fps: Tensor
    """float64 (M,), frames per second of the clip (the file's over the stride); NaN in old caches."""
    names: tuple[str, ...]
    """Name of the video of each row."""
    captions: tuple[str | None, ...]
    """Caption of the video of each row."""
    classes: tuple[str, ...]
    """Class names by label; empty if the data has none."""
    skipped: tuple[tuple[str, str], ...]
    """(name, reason) of videos that could not be read."""
    tokenizer: str
    """Path or hub name of the tokenizer, as given at extraction."""
    variant: str | None = None
    """Its weight variant, see `larp.hub.LarpModel.from_pretrained`."""
    folder: Path | None = None
    """Folder of the cache, for messages."""

    @classmethod
    def open(cls, folder: str | Path, expect: Mapping[str, Any] | None = None) -> "TokenCache":
        """Read a complete cache.

        Args:
            folder: written by `larp.data.extraction`.
            expect: required entries of the key, for example {"tokenizer": tokenizer.weight_hash()}.

        Raises TokenCacheError if the cache is missing, incomplete or damaged, if its key differs from `expect`, or if it
        was made by another `CODE_VERSION`.
        """
        folder = Path(folder)
        if not (folder / INDEX).is_file():
            if (folder / KEY).is_file():
                raise TokenCacheError(f"{folder} is unfinished: run the extraction again, it resumes where it stopped")
            raise TokenCacheError(f"{folder} holds no token cache: make one with training/extract_tokens.py")
        index = read_index(folder)
        check_key(
            {"code_version": 1} | index["key"],
            {"code_version": CODE_VERSION} | dict(expect or {}),
            f"the token cache {folder}",
            "extract the tokens again, into another folder",
        )
        try:
            return cls._read(folder, index)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise TokenCacheError(
                f"{folder} is damaged ({error}): extract the tokens anew into another folder"
            ) from error

    @classmethod
    def _read(cls, folder: Path, index: Mapping[str, Any]) -> "TokenCache":
        names = tqdm(index["shards"], desc="tokens", disable=len(index["shards"]) < 200)
        shards = [read_shard(folder / name) for name in names]
        for tensors, _ in shards:
            tensors.setdefault("fps", torch.full((len(tensors["codes"]),), torch.nan, dtype=torch.float64))
        found = [name for name in COLUMNS if name in shards[0][0]]
        columns = {name: torch.cat([tensors[name] for tensors, _ in shards]) for name in found}
        if columns["codes"].shape[1] != index["key"]["num_tokens"] or index["key"]["codebook_size"] < 1:
            raise IndexError(f"its codes do not fit {INDEX}")
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
        """Return the most frequent frames per second of the clips, or `default` for an old cache that has none."""
        known = self.fps[~self.fps.isnan()]
        return known.mode().values.item() if len(known) else default

    def load_tokenizer(self, path: str | Path | None = None, device: torch.device | str = "cpu"):
        """Load the LarpTokenizer that made the codes, from `path` or, by default, from the path in the index.

        Raises CheckpointError if `path` holds no tokenizer, TokenCacheError if it holds another one or if the path in
        the index holds none.
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
                f"{where} names its tokenizer as it was given at extraction: {error}; give --tokenizer"
            ) from error
        check_key(
            self.key,
            {"tokenizer": tokenizer.weight_hash()},
            f"the token cache {where}",
            "give the --tokenizer that it was made with, or extract the tokens again",
        )
        return tokenizer

    def select(self, rows: Tensor) -> "TokenCache":
        """Return a cache of the given rows, int64 (m,)."""
        selected = rows.tolist()
        columns = {name: getattr(self, name)[rows] for name in COLUMNS if getattr(self, name) is not None}
        names, captions = tuple(self.names[i] for i in selected), tuple(self.captions[i] for i in selected)
        return replace(self, **columns, names=names, captions=captions)

    def batch(self, rows: Tensor, task: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return codes int64 (b, N) and the generator's condition of the given rows, int64 (b,).

        The condition is labels (b,) for the task "class", else the given codes and the separator (b, N + 1).
        """
        codes = self.codes[rows].long().to(device)
        if task == "class":
            return codes, self.labels[rows].to(device)
        return codes, with_separator(self.conditions[rows].long().to(device), self.codebook_size)

    def require(self, task: str, where: str, classes: tuple[str, ...] | None = None) -> None:
        """Raise TokenCacheError if the cache lacks what a generator's task needs: labels for all clips, or conditions.

        `where` names the data in messages; `classes` are the required class names.
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

    def joined(self, other: "TokenCache") -> "TokenCache":
        """Return a cache of the rows of both, with the classes of both; its key is this one's.

        Raises TokenCacheError if the codes are of different tokenizers, or only one holds codes of given frames.
        """
        shared = ("tokenizer", "num_tokens", "codebook_size", "frames", "condition_frames")
        what = f"the token cache {other.folder or ''}".strip()
        check_key(
            other.key,
            {name: self.key[name] for name in shared},
            what,
            "extract its tokens like those it is joined with",
        )
        classes = (*self.classes, *(name for name in other.classes if name not in self.classes))
        new = torch.tensor([*(classes.index(name) for name in other.classes), -1])
        rows = {
            "labels": new[other.labels],
            "videos": other.videos + int(self.videos.max() + 1),
            "codes": other.codes.to(self.codes.dtype),
        }
        columns = {
            name: torch.cat([getattr(self, name), rows.get(name, getattr(other, name))])
            for name in COLUMNS
            if getattr(self, name) is not None
        }
        return replace(
            self, **columns, names=self.names + other.names, captions=self.captions + other.captions, classes=classes,
            skipped=self.skipped + other.skipped,
        )  # fmt: skip

    def hold_out(self, every: int = 20) -> tuple["TokenCache", "TokenCache"]:
        """Split into (training rows, held-out rows), holding out every `every`-th video with all its windows.

        Raises TokenCacheError if there are too few videos for both.
        """
        held_out = self.videos % every == every - 1
        if held_out.all() or not held_out.any():
            raise TokenCacheError(
                f"{self.folder or 'the token cache'} holds {len(self.videos.unique())} videos, too few to hold out one"
                f" in {every}: give a second token cache to validate on with --eval-tokens DIR"
                " (training/extract_tokens.py makes one)"
            )
        return self.select((~held_out).nonzero()[:, 0]), self.select(held_out.nonzero()[:, 0])


def with_separator(given: Tensor, codebook_size: int) -> Tensor:
    """Append the separator K to the codes (b, N) of given frames: the condition of frame prediction, (b, N + 1)."""
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
    augmented: int = 0,
) -> dict[str, Any]:
    """Return everything that the codes depend on, as plain values: caches with equal keys hold equal codes.

    The arguments are those of `larp.data.extraction.extract_tokens`.
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


def shard_slices(videos: int) -> list[range]:
    """Return the videos of each shard; depends on their number only, so that any number of ranks can resume."""
    size = min(max(videos // 64, 8), 512)
    return [range(start, min(start + size, videos)) for start in range(0, videos, size)]


def shard_path(folder: Path, shard: int) -> Path:
    """Return the path of a shard."""
    return folder / f"shard-{shard:05d}.safetensors"


def write_shard(path: Path, tensors: dict[str, Tensor], videos: list[list], skipped: list[list[str]]) -> None:
    """Write a shard atomically. Raises TokenCacheError if it cannot be written.

    Args:
        path: see `shard_path`.
        tensors: columns of `TokenCache` by name.
        videos: [index, name, caption] of each video with rows in this shard.
        skipped: [name, reason] of each video without rows.
    """
    try:
        with replacing(path, sync=True) as part:
            save_file(tensors, part, metadata={"videos": json.dumps(videos), "skipped": json.dumps(skipped)})
    except OSError as error:
        what = f"{path} cannot be written ({error.strerror}); the shards before it are whole"
        raise TokenCacheError(f"{what}: make room, and run the extraction again, which goes on there") from error


def read_shard(path: Path) -> tuple[dict[str, Tensor], dict[str, list]]:
    """Return the columns of a shard, and its `videos` and `skipped`. Raises TokenCacheError for a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            notes = {name: json.loads(text) for name, text in file.metadata().items() if name in ("videos", "skipped")}
            return {name: file.get_tensor(name) for name in file.keys()}, notes  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        remedy = f"delete this file and {INDEX} beside it, and run the extraction again"
        raise TokenCacheError(f"{path}: {error}; {remedy}") from error


def begin_cache(folder: Path, key: dict[str, Any]) -> None:
    """Create the folder and write the key.

    Raises TokenCacheError if the folder was begun with another key or cannot be written.
    """
    try:
        if (folder / KEY).is_file():
            check_key(
                _read_json(folder / KEY),
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


def finish_cache(
    folder: Path,
    key: dict[str, Any],
    classes: tuple[str, ...],
    tokenizer: str,
    shards: int,
    variant: str | None = None,
) -> None:
    """Write the index, which marks the cache as complete. Raises TokenCacheError if a shard is missing."""
    paths = [shard_path(folder, shard) for shard in range(shards)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise TokenCacheError(
            f"{folder}: {len(missing)} shards are missing ({missing[0]}, ...): run the extraction again"
        )
    index = {"key": key, "classes": list(classes), "tokenizer": tokenizer, "variant": variant}
    write_json(folder / INDEX, index | {"shards": [path.name for path in paths]})


def read_index(folder: Path) -> dict[str, Any]:
    """Read the index of a complete cache. Raises TokenCacheError that names what a damaged one lacks."""
    index, kinds = _read_json(folder / INDEX), {"key": dict, "classes": list, "tokenizer": str, "shards": list}
    fields = index if isinstance(index, dict) else {}
    if lacking := [name for name, kind in kinds.items() if not isinstance(fields.get(name), kind)]:
        raise TokenCacheError(
            f"{folder / INDEX} is damaged: it lacks {', '.join(lacking)}; delete this file, and run the extraction again"
        )
    return fields


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise TokenCacheError(f"{path} cannot be read ({error}): extract the tokens again") from error


def batch_rows(rows: int, step: int, global_batch: int, seed: int) -> Tensor:
    """Return the rows, int64 (global_batch,), of a training step; each epoch has a new order, batches span epochs.

    A function of its arguments only: a resumed run needs only the step, and each rank takes its slice.
    """
    positions = range(step * global_batch, (step + 1) * global_batch)
    return torch.stack([_order(rows, seed, position // rows)[position % rows] for position in positions])


@functools.lru_cache(maxsize=8)
def _order(rows: int, seed: int, epoch: int) -> Tensor:
    mixed = (seed * 0x9E3779B97F4A7C15 + (epoch + 1) * 0xBF58476D1CE4E5B9) % (1 << 63)
    return torch.randperm(rows, generator=torch.Generator().manual_seed(mixed))
