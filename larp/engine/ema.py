"""The exponential moving average of a model's weights, which often is the better model at the end of a training."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class WeightAverage:
    """A copy of a module whose weights follow those in training: average <- decay * average + (1 - decay) * weights.

    torch's AveragedModel, in float32 like the weights; buffers are copied. The first update copies the weights.

    Args:
        module: whole (not sharded) on every rank, as at zero_stage 0 to 2.
        decay: between 0 and 1: about the last 1 / (1 - decay) updates count. ValueError outside.
    """

    def __init__(self, module: nn.Module, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"ema = {decay} is a decay between 0 and 1, such as 0.999; 0 turns the average off")
        self._decay = decay
        self._averaged = AveragedModel(module).requires_grad_(False).eval()

    @property
    def module(self) -> nn.Module:
        """The averaged module, in evaluation mode."""
        return self._averaged.module

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the weights of the module after a step of its optimizer."""
        averaged, weights = list(self.module.parameters()), list(module.parameters())
        # torch's own update sends its counter to the device each time, and waits for it.
        if self._averaged.n_averaged == 0:
            torch._foreach_copy_(averaged, weights)
        else:
            torch._foreach_lerp_(averaged, weights, 1 - self._decay)
        for kept, buffer in zip(self.module.buffers(), module.buffers(), strict=True):
            kept.copy_(buffer)
        self._averaged.n_averaged += 1

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the averaged weights and how many updates they hold."""
        return self._averaged.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take up a `state_dict` of the same model."""
        self._averaged.load_state_dict(state)
