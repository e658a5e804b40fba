"""Optimizer steps that skip a non-finite gradient on the device, without synchronising with the host.

Reading a number from a GPU stalls the program until the queued work is done, and then the GPU until new work arrives.
Here the number of skipped steps is read one step later, when it is already available.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer


def fuse(optimizer: Optimizer) -> bool:
    """Switch Adam or AdamW, alone or beside Muon, to torch's fused kernel, which supports `found_inf`; else return False."""
    adam = getattr(optimizer, "adam", optimizer)
    if type(adam) not in (Adam, AdamW):
        return False
    for group in adam.param_groups:
        group.update(fused=True, foreach=False)
    return True


def move_step_counters(optimizer: Optimizer) -> None:
    """Move Adam's step counters, after loading a checkpoint, to the device and dtype that its fused kernel needs."""
    adam = getattr(optimizer, "adam", optimizer)
    for parameter, state in adam.state.items():
        if "step" in state:
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(parameter.device)


class DeviceSteps:
    """Clips the gradients of a module and sets `found_inf` of its fused optimizer, on the device.

    Attributes:
        norm: norm of the last gradient before clipping, a scalar tensor on the device; None before the first step.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, clip: float, device: torch.device):
        self.module, self.optimizer, self.clip = module, optimizer, clip
        self.norm: Tensor | None = None
        # Number of skipped steps, in total and in a row: counted on the device, copied to the host asynchronously.
        self.counts = torch.zeros(2, device=device)
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._copy = torch.zeros(2, pin_memory=device.type == "cuda")

    @torch.no_grad()
    def prepare(self) -> None:
        """Clip gradients and set `found_inf`; to be called between the backward pass and the optimizer's step."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        self.norm = nn.utils.get_total_norm(gradients)
        if self.clip > 0:
            nn.utils.clip_grads_with_norm_(self.module.parameters(), self.clip, self.norm)
        skipped = (~self.norm.isfinite()).float()
        adam = getattr(self.optimizer, "adam", self.optimizer)
        adam.found_inf = self.optimizer.found_inf = skipped
        # A skipped step increments both counts; any other step resets the second one.
        self.counts.add_(skipped)
        self.counts[1].mul_(skipped)
        self._copy.copy_(self.counts, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def in_a_row(self) -> int:
        """Number of consecutive skipped steps up to the last prepared one; does not wait for later work."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._copy[1])

    def count(self) -> int:
        """Total number of skipped steps; waits for the device."""
        return int(self.counts[0])

    def restart(self, count: int) -> None:
        """Set the total number of skipped steps, when a checkpoint is loaded."""
        self.counts.copy_(torch.tensor([float(count), 0.0]))
        self._copy.zero_()
