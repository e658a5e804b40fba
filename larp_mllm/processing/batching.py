"""Sequences of ids -> a batch: checked, padded on request, never truncated."""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

from larp.config import check_count, is_whole

import numpy as np
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase

SIDES = ("left", "right")


class BatchOptions(TypedDict, total=False):
    """Options of `batch_ids`, of the processor's call and of its apply_chat_template."""

    return_tensors: Literal["pt", "np"] | None
    """Type of tensors; None: lists."""
    padding: bool | Literal["longest", "max_length", "do_not_pad"]
    """True or "longest": to the longest sequence; "max_length": to `max_length`."""
    padding_side: Literal["left", "right"] | None
    """By default the text tokenizer's."""
    truncation: bool
    """Must be False: truncation could cut a video span."""
    max_length: int | None
    """Largest number of ids of a sequence."""


def batch_ids(
    sequences: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    return_tensors: str | None = None,
    padding: bool | str = False,
    padding_side: str | None = None,
    truncation: bool | str | None = False,
    max_length: int | None = None,
) -> BatchFeature:
    """Sequences of ids -> input_ids and attention_mask, lists or (B, S).

    Args:
        sequences: B lists of ids.
        tokenizer: text tokenizer with the padding id.

    The other arguments: see `BatchOptions`. Raises ValueError for other values, a sequence longer than max_length, and
    tensors of sequences of different lengths.
    """
    side = check_side(padding_side or tokenizer.padding_side)
    if truncation not in (None, False, "do_not_truncate"):
        raise ValueError(
            f"truncation is {truncation!r}, but nothing is truncated, since that could cut a video: shorten the texts or leave "
            "out videos"
        )
    if max_length is not None:
        check_count("max_length", max_length)
    lengths = [len(ids) for ids in sequences]
    longest = max(lengths, default=0)
    if max_length is not None and longest > max_length:
        raise ValueError(
            f"sequence {lengths.index(longest)} has {longest} ids, more than max_length = {max_length}, and nothing is "
            "truncated: shorten its text, leave out videos, or raise max_length"
        )
    masks = [[1] * length for length in lengths]
    if (length := _padded_length(padding, longest, max_length)) is not None:
        # Masked out, so any text id serves.
        fill = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        sequences = [_padded(ids, length, fill, side) for ids in sequences]
        masks = [_padded(mask, length, 0, side) for mask in masks]
    elif return_tensors is not None and len(set(lengths)) > 1:
        raise ValueError(f"the texts have {sorted(set(lengths))} ids, a tensor needs one length: give padding=True")
    return BatchFeature({"input_ids": sequences, "attention_mask": masks}, tensor_type=return_tensors)


def check_side(side: str) -> str:
    """`side`. Raises ValueError unless it is left or right."""
    if side not in SIDES:
        raise ValueError(f"padding_side must be {' or '.join(SIDES)}, got {side!r}")
    return side


def to_id_list(ids: Any, size: int) -> list[int]:
    """`ids` as a list. Raises ValueError unless they are whole numbers in [0, size)."""
    ids = ids.tolist() if isinstance(ids, (Tensor, np.ndarray)) else ids
    if not isinstance(ids, Sequence) or not all(map(is_whole, ids)):
        raise ValueError(f"ids must be one sequence of whole numbers, got {str(ids)[:80]!r}")
    if wrong := [i for i in ids if not 0 <= i < size]:
        raise ValueError(f"id {wrong[0]} is out of range: the ids of this model are 0 to {size - 1}")
    return list(ids)


def _padded_length(padding: bool | str, longest: int, max_length: int | None) -> int | None:
    if padding in (False, "do_not_pad"):
        return None
    if padding in (True, "longest"):
        return longest
    if padding == "max_length" and max_length is not None:
        return max_length
    raise ValueError(f'padding must be True, False, or "max_length" with a max_length, got {padding!r}')


def _padded(values: list[int], length: int, fill: int, side: str) -> list[int]:
    padding = [fill] * (length - len(values))
    return padding + values if side == "left" else values + padding
