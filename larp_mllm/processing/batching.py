"""Rows of ids: checked, and made one batch of one length. They are padded where that is asked for, and never cut."""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

from larp_mllm.checks import check_count, is_whole

import numpy as np
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase

SIDES = ("left", "right")


def whole_numbers(ids: Any, size: int) -> list[int]:
    """`ids` as a list; ValueError unless they are whole numbers in [0, size)."""
    ids = ids.tolist() if isinstance(ids, (Tensor, np.ndarray)) else ids
    if not isinstance(ids, Sequence) or not all(map(is_whole, ids)):
        raise ValueError(f"ids must be one row of whole numbers, got {str(ids)[:80]!r}")
    if wrong := [i for i in ids if not 0 <= i < size]:
        raise ValueError(f"id {wrong[0]} is none of this model: its ids are 0 to {size - 1}")
    return list(ids)


def check_side(side: str) -> str:
    """`side`; ValueError unless it is left or right."""
    if side not in SIDES:
        raise ValueError(f"padding_side must be {' or '.join(SIDES)}, got {side!r}")
    return side


class Batching(TypedDict, total=False):
    """How rows become a batch: the options of `batched`, of the processor's call and of its apply_chat_template."""

    return_tensors: Literal["pt", "np"] | None
    """The kind of tensors, or None for lists."""
    padding: bool | Literal["longest", "max_length", "do_not_pad"]
    """True or "longest": to the longest row; "max_length": to `max_length`."""
    padding_side: Literal["left", "right"] | None
    """By default that of the text tokenizer."""
    truncation: bool
    """False; a row that is cut could end within a video."""
    max_length: int | None
    """The most ids that a row may have."""


def batched(
    rows: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    single: bool,
    return_tensors: str | None = None,
    padding: bool | str = False,
    padding_side: str | None = None,
    truncation: bool | str | None = False,
    max_length: int | None = None,
) -> BatchFeature:
    """Rows of ids -> input_ids and attention_mask: lists (of a single row without tensors that one alone) or (B, S).

    tokenizer: has the padding id. single: whether one row was asked for, not a list of one. The others: see `Batching`.
    Raises ValueError for another option, a row beyond max_length, and tensors of rows of several lengths.
    """
    side = check_side(padding_side or tokenizer.padding_side)
    if truncation not in (None, False, "do_not_truncate"):
        raise ValueError(
            f"truncation is {truncation!r}, but nothing is cut here: a row could end within a video, or lose its question. "
            "Shorten the texts or leave out videos; max_length alone refuses what is longer"
        )
    if max_length is not None:
        check_count("max_length", max_length)
    lengths = [len(row) for row in rows]
    longest = max(lengths, default=0)
    if max_length is not None and longest > max_length:
        raise ValueError(
            f"row {lengths.index(longest)} has {longest} ids, more than max_length = {max_length}, and nothing is "
            "cut: shorten its text, leave out videos, or allow more"
        )
    masks = [[1] * length for length in lengths]
    if (length := _padded_length(padding, longest, max_length)) is not None:
        # Masked out, so any text id will do.
        fill = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        rows = [_padded(row, length, fill, side) for row in rows]
        masks = [_padded(mask, length, 0, side) for mask in masks]
    elif return_tensors is not None and len(set(lengths)) > 1:
        raise ValueError(f"the texts have {sorted(set(lengths))} ids, a tensor needs one length: give padding=True")
    if single and return_tensors is None:
        rows, masks = rows[0], masks[0]
    return BatchFeature({"input_ids": rows, "attention_mask": masks}, tensor_type=return_tensors)


def _padded_length(padding: bool | str, longest: int, max_length: int | None) -> int | None:
    if padding in (False, "do_not_pad"):
        return None
    if padding in (True, "longest"):
        return longest
    if padding == "max_length" and max_length is not None:
        return max_length
    raise ValueError(f'padding must be True, False, or "max_length" with a max_length, got {padding!r}')


def _padded(row: list[int], length: int, fill: int, side: str) -> list[int]:
    filler = [fill] * (length - len(row))
    return filler + row if side == "left" else row + filler
