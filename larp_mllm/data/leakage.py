"""Which data are held out, and leakage: held-out data that are trained on as well."""

import hashlib
from collections.abc import Collection, Hashable, Iterable, Sequence

from torch import Tensor

HELD_OUT = 20
"""One video, record, document or piece of text in this many is held out where no other data to evaluate on are given."""
_SHOWN = 3
"""Most names in a message."""


def held_out_rows(numbers: list[int], every: int = HELD_OUT) -> list[int]:
    """Return the rows of every n-th content, see `content_numbers`; none if there are fewer than n contents."""
    return [row for row, number in enumerate(numbers) if number % every == every - 1]


def content_numbers(ids: Iterable[Tensor]) -> list[int]:
    """Number sequences of ids by content, 0, 1, ... in order of first occurrence; equal sequences have one number."""
    numbers: dict[bytes, int] = {}
    digests = (hashlib.blake2b(row.int().contiguous().numpy().tobytes(), digest_size=16).digest() for row in ids)
    return [numbers.setdefault(digest, len(numbers)) for digest in digests]


def content_digest(ids: Iterable[Tensor]) -> str:
    """Return a hash of sequences of ids in their order."""
    total = hashlib.sha256()
    for row in ids:
        total.update(len(row).to_bytes(8, "little") + row.int().contiguous().numpy().tobytes())
    return total.hexdigest()


def same_videos(train: Iterable[str], held_out: Iterable[str]) -> list[str]:
    """Return a one-line message if held-out videos have names of training videos, else nothing."""
    evaluated = dict.fromkeys(held_out, False)
    for name in train:  # may be millions, which a set would hold in memory
        if name in evaluated:
            evaluated[name] = True
    both = [name for name, trained in evaluated.items() if trained]
    return _message(len(both), len(evaluated), "videos have the name of one that is trained on", both)


def same_videos_of_records(
    names: Sequence[str], videos: Sequence[Collection[Hashable]], held_out: Collection[int]
) -> list[str]:
    """Return a one-line message if held-out records share a video with the others, else nothing.

    names, videos: of all records; held_out: row numbers.
    """
    apart = set(held_out)
    trained = {video for row, shown in enumerate(videos) if row not in apart for video in shown}
    both = [names[row] for row in held_out if not trained.isdisjoint(videos[row])]
    return _message(len(both), len(apart), "records show a video that is trained on in another record", both)


def same_text(train: Sequence[Tensor], held_out: Sequence[Tensor]) -> list[str]:
    """Return a one-line message if pieces of text, int64 (S,) ids each, are in both, else nothing."""
    numbers = content_numbers([*train, *held_out])
    trained, evaluated = set(numbers[: len(train)]), numbers[len(train) :]
    both = sum(number in trained for number in evaluated)
    return _message(both, len(evaluated), "pieces of text are trained on as well", [])


def _message(both: int, evaluated: int, what: str, names: list[str]) -> list[str]:
    if not both:
        return []
    more = ", ..." if len(names) > _SHOWN else ""
    shown = f" ({', '.join(names[:_SHOWN])}{more})" if names else ""
    return [f"{both} of {evaluated} held-out {what}{shown}: figures from these say little about what is new"]
