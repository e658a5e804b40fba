"""Exponential moving average (EMA) of a model's weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class WeightAverage:
    """A copy of a module updated by average <- decay * average + (1 - decay) * weights.

    Based on torch's AveragedModel, in float32. The first update copies the weights; buffers are always copied.

    Args:
        module: not sharded, as at zero_stage 0 to 2.
        decay: in (0, 1), else ValueError; the average covers about the last 1 / (1 - decay) updates.
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
        """Update the average with the weights of the module, after a step of its optimizer."""
        averaged, weights = list(self.module.parameters()), list(module.parameters())
        # AveragedModel.update_parameters would synchronise with the device to read its counter.
        if self._averaged.n_averaged == 0:
            torch._foreach_copy_(averaged, weights)
        else:
            torch._foreach_lerp_(averaged, weights, 1 - self._decay)
        for averaged_buffer, buffer in zip(self.module.buffers(), module.buffers(), strict=True):
            averaged_buffer.copy_(buffer)
        self._averaged.n_averaged += 1

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the averaged weights and the number of updates."""
        return self._averaged.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Load a `state_dict` of the same model."""
        self._averaged.load_state_dict(state)
