"""The texts of the videos of a token cache, and which rows have none that can be learned."""

import re
from collections.abc import Iterator, Sequence

from larp.data.listing import captions_of, humanize
from larp.data.token_cache import TokenCache
from larp.data.token_rows import TEXT_CHUNK, chunks

import torch

# Class names are more often actions than things, and users phrase prompts in any of these ways.
PHRASINGS = ("{}", "a person {}", "a video of {}", "a video of a person {}", "someone is {}", "a short clip of {}")
_DIRECTION = re.compile(r"\b(?:left|right)(?:most|wards?)?\b", re.IGNORECASE)


class Phrases(Sequence[tuple[str, ...]]):
    """The texts of each row of a cache, made on access: its caption, or the phrasings of its class.

    Access raises ValueError that names a video without either.
    """

    def __init__(self, cache: TokenCache):
        self._cache = cache

    def __len__(self) -> int:
        return len(self._cache)

    def __getitem__(self, row: int) -> tuple[str, ...]:
        rows = torch.tensor([row])
        return self._checked(row, self._cache.texts("captions", rows)[0], int(self._cache.take("labels", rows)))

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        for _, texts in self.longer_than(-1):
            yield texts

    def longer_than(self, size: int) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Yield (row, its texts) of the rows with a class, or with a caption of more than `size` bytes; -1: of all rows."""
        for rows in chunks(len(self), TEXT_CHUNK):
            if size >= 0:
                labels = self._cache.take("labels", rows)
                rows = rows[(labels >= 0) | (self._cache.text_sizes("captions", rows) > size)]
            for row, caption, label in zip(*_described(self._cache, rows), strict=True):
                yield row, self._checked(row, caption, label)

    def _checked(self, row: int, caption: str | None, label: int) -> tuple[str, ...]:
        if not (texts := _phrases(self._cache, caption, label)):
            raise ValueError(
                f"video {self._cache.names[row]} has neither a caption nor a class, so there is no text to learn: extract tokens "
                "from a manifest with a caption or label column"
            )
        return texts


def caption_phrases(cache: TokenCache) -> list[tuple[str, ...]]:
    """Return the texts of each row as a list, see `Phrases`."""
    return list(Phrases(cache))


def drop_without_text(cache: TokenCache) -> TokenCache:
    """Return the cache without the rows that have neither a caption nor a class; ValueError if no row has one."""
    lacking = torch.zeros(len(cache), dtype=torch.bool)
    for rows in chunks(len(cache), TEXT_CHUNK):
        unlabelled = (cache.take("labels", rows) < 0) | (not cache.classes)
        lacking[rows] = unlabelled & (cache.text_sizes("captions", rows) < 0)
    if len(cache) and lacking.all():
        Phrases(cache)[0]  # raises
    return cache.select((~lacking).nonzero()[:, 0]) if lacking.any() else cache


def drop_mirrored_directions(cache: TokenCache) -> TokenCache:
    """Return the cache without the mirrored rows whose text says left or right: they show the opposite direction."""
    right = torch.ones(len(cache), dtype=torch.bool)
    for rows in chunks(len(cache), TEXT_CHUNK):
        mirrored = rows[cache.take("flipped", rows)]
        for row, caption, label in zip(*_described(cache, mirrored), strict=True):
            right[row] = not any(map(_DIRECTION.search, _phrases(cache, caption, label)))
    return cache if right.all() else cache.select(right.nonzero()[:, 0])


def _described(cache: TokenCache, rows: torch.Tensor) -> tuple[list[int], list[str | None], list[int]]:
    """Return the given rows, and their captions and labels."""
    return rows.tolist(), cache.texts("captions", rows), cache.take("labels", rows).tolist()


def _phrases(cache: TokenCache, caption: str | None, label: int) -> tuple[str, ...]:
    """Return the texts of a row, none if it has neither a caption nor a class."""
    class_name = humanize(cache.classes[label]) if label >= 0 and cache.classes else None
    if caption is None and class_name is None:
        return ()
    # Data sets with classes repeat the class name as the caption; only another caption says more.
    return tuple(p.format(class_name) for p in PHRASINGS) if caption in (None, class_name) else captions_of(caption)
