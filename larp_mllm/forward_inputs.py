"""What forward is given, checked, and the positions that it gives logits for. B batch, S sequence, H hidden width."""

import inspect
from typing import Any

from larp_mllm.sequence import IGNORE
from larp_mllm.vocabulary import Vocabulary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import TransformersKwargs


def check_options(options: dict[str, Any], decoder: PreTrainedModel) -> None:
    """TypeError unless each of the options is one of `decoder`, or one that transformers hands on to attention."""
    unknown = options.keys() - TransformersKwargs.__optional_keys__
    if unknown and (unknown := unknown - inspect.signature(decoder.forward).parameters.keys()):
        raise TypeError(
            f"forward() got an unexpected keyword argument {min(unknown)!r}: neither this model nor its base takes it"
        )


def check_ids(vocabulary: Vocabulary, ids: Tensor | None, labels: Tensor | None) -> None:
    """ValueError unless ids, where given, are ids of the model, and labels are those or -100.

    It waits for the device once in all. Under torch.compile, whose graph that would break, nothing is checked.
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


def kept(hidden: Tensor, positions: int | Tensor) -> Tensor:
    """Hidden states (B, S, H) at some positions, chosen as by `logits_to_keep` of transformers' models.

    positions: so many last ones (0: all), int64 (n,) for all rows or (B, n) for each, or bool (B, S), which gives (n, H).
    """
    if isinstance(positions, Tensor) and positions.ndim == 2:
        return (
            hidden[positions] if positions.dtype == torch.bool else hidden.take_along_dim(positions[..., None], dim=1)
        )
    return hidden[:, slice(-positions, None) if isinstance(positions, int) else positions]
