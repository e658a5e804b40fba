"""Token sequences of different lengths -> one batch."""

from larp_mllm.sequence import IGNORE, TokenSequence

import torch
from torch import Tensor


def collate(sequences: list[TokenSequence]) -> dict[str, Tensor]:
    """-> input_ids and labels, int64 (B, longest), padded on the right with id 0 and label -100.

    No attention mask: under causal attention no real position can see the padding that follows it.
    """
    longest = max(len(sequence.ids) for sequence in sequences)
    input_ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    labels = torch.full((len(sequences), longest), IGNORE, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence.ids)] = sequence.ids
        labels[row, : len(sequence.ids)] = sequence.labels
    return {"input_ids": input_ids, "labels": labels}
