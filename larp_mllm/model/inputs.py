"""What a call of the model may give: options, ids and labels, and the positions whose logits are wanted."""

import inspect
from typing import Any

from larp_mllm.model.vocabulary import IGNORE, Vocabulary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import TransformersKwargs

# What continuous batching of transformers passes on to attention.
_PAGED = {"cache", "read_index", "write_index", "block_table", "logits_indices", "logits_processor_args"}


def check_options(options: dict[str, Any], decoder: PreTrainedModel) -> None:
    """Raise TypeError for an option that neither `decoder` takes nor transformers passes on to attention."""
    unknown = options.keys() - TransformersKwargs.__optional_keys__ - _PAGED
    if unknown and (unknown := unknown - inspect.signature(decoder.forward).parameters.keys()):
        raise TypeError(
            f"forward() got an unexpected keyword argument {min(unknown)!r}: neither this model nor its base takes it"
        )


def check_ids(vocabulary: Vocabulary, ids: Tensor | None, labels: Tensor | None) -> None:
    """Raise ValueError unless all ids are in the vocabulary, and all labels are ids or -100.

    Synchronises with the device once. Checks nothing under torch.compile, whose graph this would break.
    """
    given = {} if ids is None else {"input_ids": ids}
    if labels is not None:
        given["labels"] = labels.masked_fill(labels == IGNORE, 0)
    given = {name: values for name, values in given.items() if values.numel()}
    if not given or torch.compiler.is_compiling():
        return
    ends = torch.stack([end for values in given.values() for end in torch.aminmax(values)]).tolist()
    for name, low, high in zip(given, ends[::2], ends[1::2], strict=True):
        if low < 0 or high >= vocabulary.size:
            raise ValueError(
                f"{name} holds {low if low < 0 else high}, but the ids of this model are 0 to {vocabulary.size - 1}"
                f"{f' (and {IGNORE} in labels: not a target)' if name == 'labels' else ''}: take the processor that was "
                "saved with the model"
            )


def select_positions(hidden: Tensor, positions: int | Tensor) -> Tensor:
    """Hidden states (B, S, H) at the positions given by `logits_to_keep` of transformers' models.

    positions: the number of last ones (0: all), int64 (n,) for all rows, int64 (B, n), or bool (B, S), which gives (n, H).
    """
    if isinstance(positions, Tensor) and positions.ndim == 2:
        return (
            hidden[positions] if positions.dtype == torch.bool else hidden.take_along_dim(positions[..., None], dim=1)
        )
    return hidden[:, slice(-positions, None) if isinstance(positions, int) else positions]
