"""Token sequences of different lengths -> rows that hold several of them -> one batch."""

from collections.abc import Sequence

from larp_mllm.model.vocabulary import IGNORE
from larp_mllm.processing.sequence import TokenSequence

import torch
from torch import Tensor


def pack(sequences: Sequence[TokenSequence], length: int | None = None, multiple: int = 1) -> list[list[TokenSequence]]:
    """Put sequences into rows of at most `length` ids, longest first, each into the first row with room.

    A function of its arguments only. length None: the longest sequence. The number of rows is a multiple of `multiple`,
    filled up with empty rows, so that every rank and micro batch gets as many. Raises ValueError, with the lengths, if a
    sequence is longer than a row: nothing is truncated.
    """
    sizes = [len(sequence.ids) for sequence in sequences]
    longest = max(sizes, default=0)
    if length is None:
        length = longest
    if longest > length:
        over = sum(size > length for size in sizes)
        raise ValueError(
            f"{over} of {len(sizes)} records are longer than a packed row of {length} ids, the longest has {longest}: "
            f"raise --sequence-length to {longest} or more, or shorten the records"
        )
    rows: list[list[TokenSequence]] = []
    room: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((row for row, free in enumerate(room) if free >= sizes[number]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(sequences[number])
        room[row] -= sizes[number]
    return rows + [[] for _ in range(-len(rows) % multiple)]


def collate(rows: Sequence[Sequence[TokenSequence]], width: int | None = None) -> dict[str, Tensor]:
    """Rows of sequences -> input_ids, labels and position_ids, int64 (B, width).

    Positions restart at each sequence, from which the model knows that attention must not cross; the first label of
    each is -100, so that none is predicted from the one before. Rows are padded on the right with id 0 and label -100
    to `width`, by default the longest row. Raises ValueError if a row is longer than `width`.
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
        # Causal attention sees no padding that follows. Where no row is packed, counting on spares the model a mask.
        if packed:
            position_ids[number, begin:] = torch.arange(width - begin)
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
