"""Rows of token caches that stay in their files: all of one cache, some of them, or those of two caches.

Each class has `len`, `take(column, rows)` (the given rows of a column, int64 (b,) -> (b, ...); None without that column),
`texts(column, rows)` (of "names" or "captions", a list), `text_sizes(column, rows)` (their bytes, int64 (b,), -1 for None) and
`skipped()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from larp.data.string_columns import string_sizes, unpack_strings
from larp.data.token_files import INDEX, TokenCacheError, map_shard

import torch
from torch import Tensor

_CHUNK = 2**20
TEXT_CHUNK = 2**16
"""Rows whose texts are read at a time, where all are."""


def chunks(rows: int, size: int = _CHUNK) -> Iterator[Tensor]:
    """Yield all row numbers in pieces, so that a column of many rows is looked through without being in memory."""
    for begin in range(0, rows, size):
        yield torch.arange(begin, min(begin + size, rows))


class StoredRows:
    """The rows of a cache in its shards, each of which is mapped at its first use.

    Args:
        folder, names: of the shards.
        counts: rows of each.
        sizes: bytes of each.
        num_tokens: codes of a clip.

    Raises TokenCacheError if a file is missing or of another size.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], counts: Sequence[int], sizes: Sequence[int], num_tokens: int
    ):
        self._paths = [folder / name for name in names]
        for path, size in zip(self._paths, sizes, strict=True):
            if not path.is_file() or path.stat().st_size != size:
                raise TokenCacheError(
                    f"{path}: is missing or damaged (not {size} bytes); delete this file and {INDEX} beside it, and run the"
                    " extraction again"
                )
        self._num_tokens = num_tokens
        self._starts = list(accumulate(counts, initial=0))
        self._ends = torch.tensor(self._starts[1:])
        self._mapped: list[tuple[dict[str, Tensor], list] | None] = [None] * len(self._paths)

    def __len__(self) -> int:
        return self._starts[-1]

    def _shard(self, number: int) -> tuple[dict[str, Tensor], list]:
        found = self._mapped[number]
        if found is None:
            found = self._mapped[number] = map_shard(self._paths[number])
            if found[0]["codes"].shape != (self._starts[number + 1] - self._starts[number], self._num_tokens):
                raise TokenCacheError(
                    f"{self._paths[number]}: holds other codes than {INDEX} says: extract the tokens again"
                )
        return found

    def take(self, column: str, rows: Tensor) -> Tensor | None:
        """See the top of this file."""
        first = self._shard(0)[0].get(column)
        if first is None:
            return None
        out = torch.empty(len(rows), *first.shape[1:], dtype=first.dtype)
        for tensors, places, local in self._by_shard(rows):
            out[places] = tensors[column][local]
        return out

    def texts(self, column: str, rows: Tensor) -> list[str | None]:
        """See the top of this file."""
        out: list[str | None] = [None] * len(rows)
        for tensors, places, local in self._by_shard(rows):
            videos, which = torch.searchsorted(tensors["video_numbers"], tensors["videos"][local]).unique(
                return_inverse=True
            )
            found = unpack_strings(tensors[column], tensors[f"{column}_ends"], videos)
            for place, number in zip(places.tolist(), which.tolist(), strict=True):
                out[place] = found[number]
        return out

    def text_sizes(self, column: str, rows: Tensor) -> Tensor:
        """See the top of this file."""
        out = torch.empty(len(rows), dtype=torch.int64)
        for tensors, places, local in self._by_shard(rows):
            videos = torch.searchsorted(tensors["video_numbers"], tensors["videos"][local])
            out[places] = string_sizes(tensors[column], tensors[f"{column}_ends"], videos)
        return out

    def _by_shard(self, rows: Tensor) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
        """Yield the tensors of each shard that holds some of the rows, the places of these in `rows`, and their rows in it."""
        which = torch.searchsorted(self._ends, rows.contiguous(), right=True)
        order = which.argsort()
        shards, counts = which[order].unique_consecutive(return_counts=True)
        for shard, places in zip(shards.tolist(), order.split(counts.tolist()), strict=True):
            yield self._shard(shard)[0], places, rows[places] - self._starts[shard]

    def skipped(self) -> list[tuple[str, str]]:
        """(name, reason) of the videos that could not be read."""
        return [tuple(pair) for number in range(len(self._paths)) for pair in self._shard(number)[1]]


class SelectedRows:
    """Some rows of others, int64 (m,)."""

    def __init__(self, source: Any, rows: Tensor):
        self._source = source
        self._rows = rows.int() if len(source) < 2**31 else rows  # half of the memory

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, column: str, rows: Tensor) -> Tensor | None:
        """See the top of this file."""
        return self._source.take(column, self._rows[rows].long())

    def texts(self, column: str, rows: Tensor) -> list[str | None]:
        """See the top of this file."""
        return self._source.texts(column, self._rows[rows].long())

    def text_sizes(self, column: str, rows: Tensor) -> Tensor:
        """See the top of this file."""
        return self._source.text_sizes(column, self._rows[rows].long())

    def skipped(self) -> list[tuple[str, str]]:
        """Those of all rows: a selection leaves out rows, not reasons."""
        return self._source.skipped()


class JoinedRows:
    """The rows of two caches.

    Args:
        first, second: the caches.
        labels: int64 (C + 1,), the label in the joined cache of each label of the second; the last stands for none.
        videos: by how much the video numbers of the second are raised.
    """

    def __init__(self, first: Any, second: Any, labels: Tensor, videos: int):
        self._first, self._second, self._labels, self._videos = first, second, labels, videos

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def take(self, column: str, rows: Tensor) -> Tensor | None:
        """See the top of this file."""
        split = rows < len(self._first)
        first = self._first.take(column, rows[split])
        if first is None:
            return None
        second = self._second.take(column, rows[~split] - len(self._first))
        if column == "labels":
            second = self._labels[second]
        elif column == "videos":
            second = second + self._videos
        out = first.new_empty(len(rows), *first.shape[1:])
        out[split], out[~split] = first, second.to(first.dtype)
        return out

    def texts(self, column: str, rows: Tensor) -> list[str | None]:
        """See the top of this file."""
        split = rows < len(self._first)
        first = iter(self._first.texts(column, rows[split]))
        second = iter(self._second.texts(column, rows[~split] - len(self._first)))
        return [next(first) if here else next(second) for here in split.tolist()]

    def text_sizes(self, column: str, rows: Tensor) -> Tensor:
        """See the top of this file."""
        split, out = rows < len(self._first), torch.empty(len(rows), dtype=torch.int64)
        out[split] = self._first.text_sizes(column, rows[split])
        out[~split] = self._second.text_sizes(column, rows[~split] - len(self._first))
        return out

    def skipped(self) -> list[tuple[str, str]]:
        """Those of both."""
        return [*self._first.skipped(), *self._second.skipped()]


class Texts(Sequence[str | None]):
    """A column of strings, each read on access; equals a tuple of the same strings."""

    def __init__(self, source: Any, column: str):
        self._source, self._column = source, column

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return tuple(self._source.texts(self._column, torch.arange(len(self))[index]))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._source.texts(self._column, torch.tensor([index % len(self)]))[0]

    def __iter__(self) -> Iterator[str | None]:
        for rows in chunks(len(self), TEXT_CHUNK):
            yield from self._source.texts(self._column, rows)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None
