"""The decoder of the last clips, kept on a GPU with its captured graphs: the next clips of the same weights need no new one."""

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

# At most one: what it was made for, its model, the state of the weights, the decoder.
_last: list[tuple[tuple, weakref.ref, Any, Decoder]] = []


@contextmanager
def reused_decoder(model: "LarpGenerator", rows: int, weights: Weights, dtype: torch.dtype | None) -> Iterator[Decoder]:
    """Give a decoder of a model as it is now: that of the last time, if model, rows, options and all weights are the same.

    On a GPU it is kept until the model is gone or another one is needed, if its cache is no larger than the weights. Elsewhere
    it is made anew, which costs little there.
    """
    made_for, state = (rows, weights, dtype), _state(model)
    # Taken out, so that a second thread makes its own.
    last = _last.pop() if _last else None
    if state is not None and last and last[0] == made_for and last[1]() is model and last[2] == state:
        decoder = last[3]
        decoder.model = model
    else:
        if last:
            last[3].runs.clear()
        last = None
        decoder = Decoder(model, rows, weights=weights, dtype=dtype)
    keep = state is not None and 2 * decoder.cache.keys.nbytes <= sum(p.nbytes for p in model.parameters())
    try:
        yield decoder
        if keep:
            # Not the model: it would never be gone.
            decoder.model = None
            forget()
            _last.append((made_for, weakref.ref(model, lambda _: forget()), state, decoder))
    except BaseException:
        keep = False
        raise
    finally:
        if not keep:
            # They hold the decoder: without this its memory would wait for the garbage collector.
            decoder.runs.clear()


def forget() -> None:
    """Let go of the decoder that is kept."""
    while _last:
        _last.pop()[3].runs.clear()


@torch.no_grad()
def _state(model: "LarpGenerator") -> Any:
    """What tells weights from those of before, or None where no decoder is kept.

    Where they are, how often they were changed, and, since changes of `data` are not counted, their norms.
    """
    parameters = [parameter.detach() for parameter in model.parameters()]
    if not all(_lasting(parameter) for parameter in parameters):
        return None
    norms = torch.stack([norm.double() for norm in torch._foreach_norm(parameters)]).tolist()
    places = [(one.data_ptr(), one._version, one.dtype, one.device, one.shape) for one in parameters]
    return norms, places


def _lasting(parameter: Tensor) -> bool:
    return parameter.is_cuda and not parameter.is_inference()
