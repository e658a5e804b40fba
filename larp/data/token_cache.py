"""The token cache: the codes of clips, encoded once and read in every epoch.

    folder/key.json                  everything that the codes depend on; written first, compared on resumption
    folder/shard-00000.safetensors   rows of a fixed slice of the videos; written atomically
    folder/index.json                written last; marks the cache as complete

Shapes: M rows (windows of videos), N codes of a clip, K codebook size, b rows of a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from larp.data.token_files import (
    CODE_VERSION,
    COLUMNS,
    INDEX,
    KEY,
    TokenCacheError,
    batch_rows,
    check_key,
    count_rows,
    discard_cache,
    file_state,
    nothing_encoded,
    read_shard,
    shard_path,
    shard_slices,
    token_key,
    write_shard,
)
from larp.data.token_rows import JoinedRows, SelectedRows, StoredRows, Texts, chunks
from larp.files import read_json, write_json

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

__all__ = [
    "CODE_VERSION", "INDEX", "KEY", "TokenCache", "TokenCacheError", "batch_rows", "discard_cache", "file_state",
    "nothing_encoded", "read_shard", "shard_path", "shard_slices", "token_key", "write_shard",
]  # fmt: skip
MAPPED_FROM = 100_000
"""Rows from which on a cache stays in its files, see `MappedCache`."""


@dataclass(frozen=True)
class TokenCache:
    """The codes of many clips; each row is one window of one video. In memory, but for `MappedCache`."""

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
        """Read a complete cache; one of `MAPPED_FROM` rows or more is a `MappedCache`.

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
            cache = cls._read(folder, index)
            mapped = isinstance(cache, MappedCache)  # whose shards are looked at when they are read
            if cache.codebook_size < 1 or (not mapped and cache.codes.shape[1] != cache.num_tokens):
                raise IndexError(f"its codes do not fit {INDEX}")
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise TokenCacheError(
                f"{folder} is damaged ({error}): extract the tokens anew into another folder"
            ) from error
        return cache

    @classmethod
    def _read(cls, folder: Path, index: Mapping[str, Any]) -> "TokenCache":
        counts, sizes = index.get("rows"), index.get("bytes")
        if counts and sizes and sum(counts) >= MAPPED_FROM:
            rows = StoredRows(folder, index["shards"], counts, sizes, index["key"]["num_tokens"])
            return MappedCache(rows, **_described(index), folder=folder)
        names = tqdm(index["shards"], desc="tokens", disable=len(index["shards"]) < 200)
        shards = [read_shard(folder / name) for name in names]
        columns = {
            name: torch.cat([tensors[name] for tensors, _ in shards]) for name in COLUMNS if name in shards[0][0]
        }
        described = {number: video for _, notes in shards for number, *video in notes["videos"]}
        rows = columns["videos"].tolist()
        return cls(
            **_described(index),
            conditions=columns.pop("conditions", None),
            **columns,
            names=tuple(described[number][0] for number in rows),
            captions=tuple(described[number][1] for number in rows),
            skipped=tuple(tuple(pair) for _, notes in shards for pair in notes["skipped"]),
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

    def take(self, column: str, rows: Tensor) -> Tensor | None:
        """Return the given rows, int64 (b,), of a column; None if the cache lacks it. No other row is read."""
        values = getattr(self, column)
        return None if values is None else values[rows]

    def texts(self, column: str, rows: Tensor) -> list[str | None]:
        """Return the names or captions (`column`) of the given rows, int64 (b,)."""
        strings = getattr(self, column)
        return [strings[row] for row in rows.tolist()]

    def text_sizes(self, column: str, rows: Tensor) -> Tensor:
        """Return the UTF-8 bytes of names or captions, int64 (b,); -1 for None."""
        texts = self.texts(column, rows)
        return torch.tensor([-1 if text is None else len(text.encode("utf-8", "surrogatepass")) for text in texts])

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
        codes = self.take("codes", rows).long().to(device)
        if task == "class":
            return codes, self.take("labels", rows).to(device)
        return codes, with_separator(self.take("conditions", rows).long().to(device), self.codebook_size)

    def require(self, task: str, where: str, classes: tuple[str, ...] | None = None) -> None:
        """Raise TokenCacheError if the cache lacks what a generator's task needs: labels for all clips, or conditions.

        `where` names the data in messages; `classes` are the required class names.
        """
        if task == "frame-prediction":
            if self.take("conditions", torch.zeros(1, dtype=torch.int64)) is None:
                raise TokenCacheError(f"{where} holds no codes of given frames: extract with --condition-frames 5")
            return
        lacking = sum(int((self.take("labels", rows) < 0).sum()) for rows in chunks(len(self)))
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
        if isinstance(self, MappedCache) or isinstance(other, MappedCache):
            above = 1 + max(int(self.take("videos", rows).max()) for rows in chunks(len(self)))
            return MappedCache(
                JoinedRows(_rows(self), _rows(other), new, above), **_fields(self) | {"classes": classes}
            )
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
        held_out = torch.cat([self.take("videos", rows) % every == every - 1 for rows in chunks(len(self))])
        if held_out.all() or not held_out.any():
            raise TokenCacheError(
                f"{self.folder or 'the token cache'} holds {len(self.videos.unique())} videos, too few to hold out one"
                f" in {every}: give a second token cache to validate on with --eval-tokens DIR"
                " (training/extract_tokens.py makes one)"
            )
        return self.select((~held_out).nonzero()[:, 0]), self.select(held_out.nonzero()[:, 0])


class MappedCache(TokenCache):
    """A cache of many rows, whose columns stay in its files.

    `take` and `batch` read the rows that they return. `names` and `captions` are read one by one. A column that is asked for as
    a whole, such as `codes`, is read as a whole. A selection costs four bytes a row.

    Args:
        rows: see larp/data/token_rows.py.
    """

    def __init__(
        self, rows: StoredRows | SelectedRows | JoinedRows, key, classes, tokenizer, variant=None, folder=None
    ):
        self.__dict__.update(
            rows=rows, key=key, classes=classes, tokenizer=tokenizer, variant=variant, folder=folder
        )  # around the setter of frozen dataclasses

    codes, conditions, labels, videos, starts, flipped, fps = (
        property(lambda self, column=column: self.rows.take(column, torch.arange(len(self)))) for column in COLUMNS
    )
    names, captions = (
        property(lambda self, column=column: Texts(self.rows, column)) for column in ("names", "captions")
    )

    @property
    def skipped(self) -> Sequence[tuple[str, str]]:
        """(name, reason) of videos that could not be read."""
        return tuple(self.rows.skipped())

    def __len__(self) -> int:
        return len(self.rows)

    def frame_rate(self, default: float) -> float:
        """Return that of most among 10,000 evenly spaced clips, or `default` for an old cache that has none."""
        fps = self.take("fps", torch.arange(0, len(self), -(-len(self) // 10_000)))
        known = fps[~fps.isnan()]
        return known.mode().values.item() if len(known) else default

    def take(self, column: str, rows: Tensor) -> Tensor | None:
        """See `TokenCache.take`."""
        return self.rows.take(column, rows)

    def texts(self, column: str, rows: Tensor) -> list[str | None]:
        """See `TokenCache.texts`."""
        return self.rows.texts(column, rows)

    def text_sizes(self, column: str, rows: Tensor) -> Tensor:
        """See `TokenCache.text_sizes`."""
        return self.rows.text_sizes(column, rows)

    def select(self, rows: Tensor) -> "MappedCache":
        """Return a cache of the given rows, int64 (m,)."""
        return MappedCache(SelectedRows(self.rows, rows), **_fields(self))


class _MemoryRows:
    """A cache in memory as a source of `JoinedRows`."""

    def __init__(self, cache: TokenCache):
        self._cache, self.take = cache, cache.take

    def __len__(self) -> int:
        return len(self._cache)

    def texts(self, column: str, rows: Tensor) -> list[str | None]:
        return self._cache.texts(column, rows)

    def text_sizes(self, column: str, rows: Tensor) -> Tensor:
        return self._cache.text_sizes(column, rows)

    def skipped(self) -> Sequence[tuple[str, str]]:
        return self._cache.skipped


def _rows(cache: TokenCache):
    return cache.rows if isinstance(cache, MappedCache) else _MemoryRows(cache)


def _fields(cache: TokenCache) -> dict[str, Any]:
    return {name: getattr(cache, name) for name in ("key", "classes", "tokenizer", "variant", "folder")}


def _described(index: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a cache that its index holds."""
    fields = {name: index.get(name) for name in ("key", "tokenizer", "variant")}
    return fields | {"classes": tuple(index["classes"])}


def with_separator(given: Tensor, codebook_size: int) -> Tensor:
    """Append the separator K to the codes (b, N) of given frames: the condition of frame prediction, (b, N + 1)."""
    return F.pad(given, (0, 1), value=codebook_size)


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
    index |= {"shards": [path.name for path in paths], "rows": list(map(count_rows, paths))}
    write_json(folder / INDEX, index | {"bytes": [path.stat().st_size for path in paths]})


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
