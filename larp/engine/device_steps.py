"""Steps of an optimizer that skip a gradient that is not finite without telling the host, which would have to wait for it.

A GPU runs behind the program that feeds it. A number that is read back stops the program until all is done, and then the GPU until
there is work again; here the answer is read one step later, when it has long been there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer


def fuse(optimizer: Optimizer) -> bool:
    """Let Adam and AdamW, alone or beside Muon, run in torch's fused kernel, which takes `found_inf`; False for all others."""
    adam = getattr(optimizer, "adam", optimizer)
    if type(adam) not in (Adam, AdamW):
        return False
    for group in adam.param_groups:
        group.update(fused=True, foreach=False)
    return True


def place_counters(optimizer: Optimizer) -> None:
    """Put Adam's step counters, as a checkpoint from another device left them, where its fused kernel wants them."""
    adam = getattr(optimizer, "adam", optimizer)
    for parameter, state in adam.state.items():
        if "step" in state:
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(parameter.device)


class DeviceSteps:
    """Clips the gradients of a module and tells its fused optimizer, on the device, whether to skip them.

    norm: of the last gradient, a scalar tensor before clipping.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, clip: float, device: torch.device):
        self.module, self.optimizer, self.clip = module, optimizer, clip
        self.norm: Tensor | None = None
        # How many steps were skipped, in all and in a row: counted there, and copied here without waiting.
        self.counts = torch.zeros(2, device=device)
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._copy = torch.zeros(2, pin_memory=device.type == "cuda")

    @torch.no_grad()
    def prepare(self) -> None:
        """Make ready for the optimizer's step, after the backward pass."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        self.norm = nn.utils.get_total_norm(gradients)
        if self.clip > 0:
            nn.utils.clip_grads_with_norm_(self.module.parameters(), self.clip, self.norm)
        skipped = (~self.norm.isfinite()).float()
        adam = getattr(self.optimizer, "adam", self.optimizer)
        adam.found_inf = self.optimizer.found_inf = skipped
        # In all: one more if this one is skipped. In a row: the same, or none.
        self.counts.add_(skipped)
        self.counts[1].mul_(skipped)
        self._copy.copy_(self.counts, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def in_a_row(self) -> int:
        """How many steps up to the last prepared one were skipped one after the other; does not wait for later work."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._copy[1])

    def count(self) -> int:
        """How many were skipped in all; waits for the device."""
        return int(self.counts[0])

    def restart(self, count: int) -> None:
        """Go on from so many skipped steps."""
        self.counts.copy_(torch.tensor([float(count), 0.0]))
        self._copy.zero_()
