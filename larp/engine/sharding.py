"""Looking at the whole weights of a module that ZeRO stage 3 has cut up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def whole(module: nn.Module, zero_stage: int) -> Iterator[None]:
    """Inside, every rank holds all weights, also those that stage 3 shards; changes are not kept. Collective.

    For reading weights, saving among them; do not call the module inside.
    """
    parameters = list(module.parameters())
    sharded = zero_stage == 3
    if sharded:
        parameters[0].all_gather(param_list=parameters)
    try:
        yield
    finally:
        if sharded:
            parameters[0].partition(param_list=parameters, has_been_updated=False)


def whole_copy(module: nn.Module, make: Callable[[], nn.Module], zero_stage: int) -> nn.Module:
    """Return the module, or where stage 3 shards it a copy with all weights, for other uses than training. Collective.

    `make()` builds a module of the same shape. No random numbers are drawn, which training would miss.
    """
    if zero_stage < 3:
        return module
    with torch.device("meta"):
        copy = make()
    with whole(module, zero_stage):
        weights = {name: weight.detach().clone() for name, weight in module.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    return copy
