"""Encoding, decoding and training steps of a tokenizer on a GPU: milliseconds, clips per second, and MFU.

Random weights and clips. MFU is the share of the matmul rate that was measured, or of the one that the maker states.
Shapes: B clips of T frames of H x W pixels.
"""

from __future__ import annotations

import time
from typing import Any

from bench import flops
from bench.measurements import between, busiest, finish, mark, seconds_of
from larp.engine.optimizer import OptimizerConfig, build_optimizer
from larp.models.layers import compile_blocks
from larp.models.noise import BatchNoise
from larp.models.objective import LossConfig, tokenizer_loss
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig

import torch
from torch import Tensor

# Dense bf16 of an H100 SXM in operations per second, as its maker states it.
NOMINAL = 989e12
# Share of sampled inputs in the prior's second round, after its ramp.
_MIX = 0.5
_LOSS = LossConfig(lpips=0, gan=0)


def build(config: TokenizerConfig, device: torch.device) -> LarpTokenizer:
    """Return a tokenizer with random weights, those of the head included."""
    torch.manual_seed(0)
    with device:
        model = LarpTokenizer(config)
        torch.nn.init.normal_(model.head.weight, std=0.02)
    return model


def clips_of(config: TokenizerConfig, batch: int, device: torch.device) -> Tensor:
    """Return random clips (B, 3, T, H, W)."""
    return torch.rand(batch, 3, *config.clip_shape, device=device)


def inference(config: TokenizerConfig, batch: int, rate: float, budget: float, device: torch.device) -> dict[str, Any]:
    """Measure encode and decode in bf16."""
    model, clips = build(config, device).eval(), clips_of(config, batch, device)
    figures: dict[str, Any] = {"batch": batch}
    with torch.autocast(device.type, torch.bfloat16):
        codes = model.encode(clips)
        works = {"encode": (lambda: model.encode(clips), flops.encode_matmuls)}
        works["decode"] = lambda: model.decode(codes), flops.decode_matmuls
        for name, (work, matmuls) in works.items():
            seconds = seconds_of(work, device, budget / 2)
            figures[name] = shares(flops.forward_flops(matmuls(config, batch)), seconds, batch, rate)
    return figures


def shares(operations: int, seconds: float, batch: int, rate: float) -> dict[str, float]:
    """Return milliseconds, clips per second, and MFU of the measured rate and of the maker's."""
    used = operations / seconds
    rates = {"clips_a_second": batch / seconds, "mfu": used / rate, "mfu_of_nominal": used / NOMINAL}
    return {"milliseconds": 1000 * seconds, **rates}


class Trainer:
    """Training steps of a tokenizer as in training/train_tokenizer.py, without the engine: bf16 autocast, AdamW."""

    def __init__(self, config: TokenizerConfig, batch: int, device: torch.device, compiled: bool):
        self.config, self.batch, self.device = config, batch, device
        self.model, self.clips = build(config, device), clips_of(config, batch, device)
        self.optimizer = build_optimizer(self.model, OptimizerConfig())
        self.steps, self.marks, self.marking = 0, {}, False
        if compiled:
            compile_blocks(self.model, device)
        for name in ("quantizer", "prior"):
            part = getattr(self.model, name)
            part.register_forward_pre_hook(lambda *_, name=name: self._mark(name))
            part.register_forward_hook(lambda *_, name=name: self._mark(f"{name} end"))

    def _mark(self, name: str) -> None:
        if self.marking:
            self.marks[name] = mark(self.device)

    def step(self) -> None:
        """Run one step: forward, backward, optimizer."""
        self._mark("forward")
        self.steps += 1
        noise = BatchNoise(0, self.steps, self.batch, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            out = self.model(self.clips, noise, _MIX)
        loss, _ = tokenizer_loss(_LOSS, self.clips, out)
        self._mark("backward")
        loss.backward()
        self._mark("optimizer")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._mark("end")

    def parts(self) -> dict[str, float]:
        """Return the shares of one step's time: quantizer, prior, the rest of forward, backward, optimizer."""
        self.marking = True
        self.step()
        finish(self.device)
        self.marking = False
        at = self.marks
        parts = {name: between(at[name], at[f"{name} end"]) for name in ("quantizer", "prior")}
        parts["forward"] = between(at["forward"], at["backward"]) - sum(parts.values())
        parts["backward"] = between(at["backward"], at["optimizer"])
        parts["optimizer"] = between(at["optimizer"], at["end"])
        return {name: round(seconds / between(at["forward"], at["end"]), 4) for name, seconds in parts.items()}


def training(
    config: TokenizerConfig,
    batch: int,
    rate: float,
    budget: float,
    device: torch.device,
    compiled: bool = False,
    kernels: bool = False,
) -> dict[str, Any]:
    """Measure a training step and the shares of its parts, and with `kernels` its kernels of longest time."""
    trainer = Trainer(config, batch, device, compiled)
    figures: dict[str, Any] = {"batch": batch, "compiled": compiled}
    if compiled:
        began = time.monotonic()
        trainer.step()
        finish(device)
        figures["seconds_to_compile"] = time.monotonic() - began
    seconds = seconds_of(trainer.step, device, budget)
    figures |= shares(flops.step_flops(config, clips=batch), seconds, batch, rate)
    figures["parts"] = trainer.parts()
    if kernels:
        figures["kernels"] = busiest(trainer.step, device)
    return figures


def engine_training(config: TokenizerConfig, batch: int, rate: float, budget: float) -> dict[str, Any]:
    """Measure the same step through `larp.engine`: DeepSpeed, gradient clipping, and the check for finite gradients."""
    from larp.engine.backend import EngineConfig, make_engine, start
    from larp.engine.backend import finish as leave

    ranks = start(seed=0)
    try:
        model = build(config, ranks.device)
        optimizer = build_optimizer(model, OptimizerConfig())
        engine = make_engine(model, optimizer, lambda step: 1.0, EngineConfig(precision="bf16"), batch, ranks)
        clips, steps = clips_of(config, batch, ranks.device), iter(range(1 << 30))

        def step() -> None:
            out = engine(clips, BatchNoise(0, next(steps), batch, device=ranks.device), _MIX)
            engine.backward(tokenizer_loss(_LOSS, clips, out)[0])
            engine.step()

        seconds = seconds_of(step, ranks.device, budget)
    finally:
        leave()
    return {"batch": batch, **shares(flops.step_flops(config, clips=batch), seconds, batch, rate)}
