"""Reuse of the last decoder and its captured CUDA graphs for the next clips with the same weights."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from larp.kernels.packed_linear import Weights
from larp.sampling.decoder import Decoder

import torch
from torch import Tensor

if TYPE_CHECKING:
    from larp.models.generator import LarpGenerator

# At most one entry: options, model, fingerprint of the weights, decoder.
_last: list[tuple[tuple, weakref.ref, Any, Decoder]] = []


@contextmanager
def reused_decoder(model: "LarpGenerator", rows: int, weights: Weights, dtype: torch.dtype | None) -> Iterator[Decoder]:
    """Yield a decoder of a model: the last one if model, rows, options and all weights are unchanged, else a new one.

    On a GPU, a decoder whose key-value cache is no larger than the weights is stored until the model is deleted or another
    decoder replaces it. On a CPU, where a new one is cheap, none is stored.
    """
    options, state = (rows, weights, dtype), _weights_state(model)
    # Removed while in use, so that a second thread builds its own.
    last = _last.pop() if _last else None
    if state is not None and last and last[0] == options and last[1]() is model and last[2] == state:
        decoder = last[3]
        decoder.embed_condition = model.embed_condition
    else:
        if last:
            last[3].saved_steps.clear()
        last = None
        decoder = Decoder(model, rows, weights=weights, dtype=dtype)
    reusable = state is not None and 2 * decoder.cache.keys.nbytes <= sum(p.nbytes for p in model.parameters())
    try:
        yield decoder
        if reusable:
            # Without a reference to the model, which could otherwise never be deleted.
            decoder.embed_condition = None
            clear()
            _last.append((options, weakref.ref(model, lambda _: clear()), state, decoder))
    except BaseException:
        reusable = False
        raise
    finally:
        if not reusable:
            # The steps refer to the decoder: without this its memory would wait for the garbage collector.
            decoder.saved_steps.clear()


def clear() -> None:
    """Delete the stored decoder."""
    while _last:
        _last.pop()[3].saved_steps.clear()


@torch.no_grad()
def _weights_state(model: "LarpGenerator") -> Any:
    """Return a fingerprint that changes with the weights, or None if decoders are not stored on this device.

    It has their addresses and version counters, and their norms, because changes through `.data` are not counted.
    """
    parameters = [parameter.detach() for parameter in model.parameters()]
    if not all(_is_cacheable(parameter) for parameter in parameters):
        return None
    norms = torch.stack([norm.double() for norm in torch._foreach_norm(parameters)]).tolist()
    versions = [(p.data_ptr(), p._version, p.dtype, p.device, p.shape) for p in parameters]
    return norms, versions


def _is_cacheable(parameter: Tensor) -> bool:
    return parameter.is_cuda and not parameter.is_inference()
