"""Packing of token sequences of different lengths into rows, and rows into a batch."""

from collections.abc import Sequence

from larp_mllm.model.vocabulary import IGNORE
from larp_mllm.processing.token_sequence import TokenSequence

import torch
from torch import Tensor

# Lengths that are tried between that of the longest sequence and its double.
_LENGTHS = 8
# Width of a row at which attention costs as much as everything else, of a small model; larger models have larger ones.
_COSTLY_WIDTH = 1000


def pack(
    sequences: Sequence[TokenSequence], length: int | None = None, multiple: int = 1, together: bool = True
) -> list[list[TokenSequence]]:
    """Pack sequences into rows of at most `length` ids: longest first, each into the first row with room.

    Args:
        length: by default the one that costs least, between that of the longest sequence and its double: beside one sequence of
            540 ids, those of 280 share rows of 560.
        multiple: empty rows are added up to a multiple of this, so that all ranks and micro batches get equally many.
        together: several sequences may share a row; False for a base that does not keep them apart, see `measure_base`.

    Raises ValueError if a sequence is longer than a row: nothing is truncated.
    """
    sizes = [len(sequence.ids) for sequence in sequences]
    longest = max(sizes, default=0)
    if length is not None and longest > length:
        over = sum(size > length for size in sizes)
        raise ValueError(
            f"{over} of {len(sizes)} records are longer than a packed row of {length} ids, the longest has {longest}: "
            f"raise --sequence-length to {longest} or more, or shorten the records"
        )
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    if not together:
        numbers = [[number] for number in order]
    else:
        lengths = [longest + longest * i // _LENGTHS for i in range(_LENGTHS + 1)] if length is None else [length]
        numbers = min(
            (_first_fit(order, sizes, most) for most in lengths), key=lambda rows: _cost(rows, sizes, multiple)
        )
    rows = [[sequences[number] for number in row] for row in numbers]
    return rows + [[] for _ in range(-len(rows) % multiple)]


def _first_fit(order: Sequence[int], sizes: Sequence[int], length: int) -> list[list[int]]:
    """Return the numbers of the sequences of each row, each in the first row with room in this order."""
    rows: list[list[int]] = []
    room: list[int] = []
    for number in order:
        row = next((row for row, free in enumerate(room) if free >= sizes[number]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(number)
        room[row] -= sizes[number]
    return rows


def _cost(rows: Sequence[Sequence[int]], sizes: Sequence[int], multiple: int) -> int:
    """Return what rows cost, all as wide as the longest: each id costs something, and something for each id of its row."""
    width = max((sum(sizes[number] for number in row) for row in rows), default=0)
    return (len(rows) + -len(rows) % multiple) * width * (width + _COSTLY_WIDTH)


def collate(rows: Sequence[Sequence[TokenSequence]], width: int | None = None) -> dict[str, Tensor]:
    """Return input_ids, labels and position_ids, int64 (B, width), of rows of sequences.

    Positions restart at each sequence, which tells the model not to attend across sequences. The first label of each
    sequence is -100: no id is predicted from another sequence. Rows are padded on the right with id 0 and label -100 to
    `width`, by default the longest row. Raises ValueError if a row is longer than `width`.
    """
    longest = max((sum(len(sequence.ids) for sequence in row) for row in rows), default=0)
    width = max(longest, 1) if width is None else width
    if longest > width:
        raise ValueError(f"a row holds {longest} ids, more than the width {width}: pack to rows of {width} ids at most")
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORE, dtype=torch.int64)
    position_ids = torch.arange(width).repeat(len(rows), 1)
    packed = any(len(row) > 1 for row in rows)
    for number, row in enumerate(rows):
        begin = 0
        for sequence in row:
            end = begin + len(sequence.ids)
            input_ids[number, begin:end] = sequence.ids
            labels[number, begin + 1 : end] = sequence.labels[1:]
            position_ids[number, begin:end] = torch.arange(end - begin)
            begin = end
        # Causal attention does not see padding on the right. Unpacked rows keep counting: the model then needs no mask.
        if packed:
            position_ids[number, begin:] = torch.arange(width - begin)
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
