"""Many strings as two tensors, which a file holds memory-mapped: their UTF-8 bytes, and where each one ends."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_NONE = b"\xff"  # never a byte of UTF-8


def pack_strings(strings: Iterable[str | None]) -> tuple[Tensor, Tensor]:
    """Return (bytes uint8 (B,), ends int64 (n,)) of n strings, each of which may be None."""
    # surrogatepass: names of files that are not UTF-8 hold lone surrogates.
    parts = [_NONE if text is None else text.encode("utf-8", "surrogatepass") for text in strings]
    ends = torch.tensor([len(part) for part in parts], dtype=torch.int64).cumsum(0)
    joined = b"".join(parts)
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8), ends


def unpack_strings(data: Tensor, ends: Tensor, indices: Tensor) -> list[str | None]:
    """Return the strings at indices, int64 (b,), of what `pack_strings` returned; only their bytes are read."""
    stops = ends[indices].tolist()
    starts = torch.where(indices > 0, ends[(indices - 1).clamp(min=0)], 0).tolist()
    memory = memoryview(data.numpy())
    parts = [bytes(memory[begin:end]) for begin, end in zip(starts, stops, strict=True)]
    return [None if part == _NONE else part.decode("utf-8", "surrogatepass") for part in parts]


def string_sizes(data: Tensor, ends: Tensor, indices: Tensor) -> Tensor:
    """Return the bytes of the strings at indices, int64 (b,); -1 for None."""
    starts = torch.where(indices > 0, ends[(indices - 1).clamp(min=0)], 0)
    sizes = ends[indices] - starts
    single = (sizes == 1).nonzero()[:, 0]
    sizes[single[data[starts[single]] == _NONE[0]]] = -1
    return sizes
