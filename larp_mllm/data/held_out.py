"""What is held out of data that come without data to judge on: by content, so that none of it is trained on as well."""

import hashlib
from collections.abc import Iterable

from torch import Tensor

HELD_OUT = 20
"""Every so manieth video, record, document or piece of text is held out where no other data are given to judge on."""


def content_numbers(ids: Iterable[Tensor]) -> list[int]:
    """A number for each sequence of ids, the same for equal ones: 0, 1, ... as they first come."""
    numbers: dict[bytes, int] = {}
    digests = (hashlib.blake2b(row.int().contiguous().numpy().tobytes(), digest_size=16).digest() for row in ids)
    return [numbers.setdefault(digest, len(numbers)) for digest in digests]


def held_out_rows(numbers: list[int], every: int = HELD_OUT) -> list[int]:
    """The rows of every n-th content; none if there are fewer than n contents."""
    return [row for row, number in enumerate(numbers) if number % every == every - 1]
