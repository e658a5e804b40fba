"""Options of an engine: sharding, precision, accumulation, clipping; and DeepSpeed's configuration made from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from larp.engine.distributed import Ranks
from larp.kernels.bf16_attention import multiplies_bf16

import torch
from torch import nn
from torch.optim import Optimizer

AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LARGEST_BUCKET = 200_000_000


@dataclass(frozen=True)
class EngineConfig:
    """Options of an engine."""

    zero_stage: int = 0
    """ZeRO stage: 0 shards nothing, 1 shards optimizer states, 2 also gradients, 3 also parameters."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """Autocast type of the forward pass; weights and gradients stay float32. fp16 works at zero_stage 0 only. `auto` becomes bf16 on
    CPUs that multiply bfloat16, else fp32."""
    processes: int | Literal["auto"] = 1
    """Processes to train in on a CPU without a launcher; `auto`: one for each core, as far as the batch can be divided among them.
    Faster than threads for small models; each process holds the model and the optimizer."""
    accumulation: int = 1
    """Micro batches per rank and optimizer step."""
    clip_grad: float = 1.0
    """Maximum global gradient norm; 0 disables clipping."""
    activation_checkpointing: bool = False
    """Recompute the activations of blocks in the backward pass: less memory for about a third more computation."""
    compile: bool = False
    """torch.compile the blocks (needs a C++ compiler). Checkpoints do not depend on it."""

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage is {self.zero_stage}, expected 0, 1, 2 or 3")
        if self.precision == "auto":
            native = multiplies_bf16() and not torch.accelerator.is_available()
            object.__setattr__(self, "precision", "bf16" if native else "fp32")
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"precision is '{self.precision}', expected fp32, bf16, fp16 or auto")
        if self.processes != "auto" and self.processes < 1:
            raise ValueError(f"processes is {self.processes}, expected at least 1, or auto")
        if self.precision == "fp16" and self.zero_stage > 0:
            raise ValueError(
                f"precision fp16 works at zero_stage 0 only, not {self.zero_stage}: deepspeed's loss scale never falls "
                "after an overflow with sharded optimizers; use bf16, or zero_stage 0"
            )
        if self.accumulation < 1:
            raise ValueError(f"accumulation is {self.accumulation}, expected at least 1")
        if self.clip_grad < 0:
            raise ValueError(f"clip_grad is {self.clip_grad}, expected a positive number, or 0 for no clipping")


def micro_batch(global_batch: int, accumulation: int, ranks: Ranks) -> int:
    """Return the clips per rank and micro batch, global_batch / (accumulation * world_size).

    Raises ValueError if that is not a whole number.
    """
    parts = accumulation * ranks.world_size
    nearest = max(1, round(global_batch / parts)) * parts
    if global_batch < 1 or global_batch % parts:
        raise ValueError(
            f"batch_size {global_batch} cannot be split into {accumulation} micro batches (accumulation) on "
            f"{ranks.world_size} ranks: it must be a multiple of {parts}, for example {nearest}"
        )
    return global_batch // parts


def check_trainable(
    module: nn.Module, optimizer: Optimizer, config: EngineConfig, name: str, max_zero_stage: int, ema: float
) -> None:
    """Raise ValueError if an engine cannot train a module; the arguments are those of `backend.make_engine`."""
    if config.zero_stage > max_zero_stage:
        raise ValueError(
            f"zero_stage {config.zero_stage} is not possible for the {name}: its raw module takes part in the "
            "loss of another model, and with the sharded parameters of stage 3 that gives silently wrong gradients; "
            f"use zero_stage 0 to {max_zero_stage}"
        )
    if ema and config.zero_stage > 2:
        raise ValueError(
            f"ema = {ema} averages whole weights, and zero_stage 3 cuts those of the {name} up: use zero_stage 0 to 2"
        )
    if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"the optimizer of the {name} has no trainable parameter: unfreeze a part of it, or do not train it"
        )
    others = sorted({str(p.dtype) for p in module.parameters() if p.is_floating_point()} - {"torch.float32"})
    if others:
        raise ValueError(
            f"the {name} has weights in {', '.join(others)}: load it in float32, `precision` decides the rest"
        )


def deepspeed_settings(module: nn.Module, config: EngineConfig, global_batch: int, ranks: Ranks) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a module."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    # The default buckets are buffers of 2 GB each, even for small models. The size is even because sharded optimizers
    # align buckets to two elements.
    bucket = min(_LARGEST_BUCKET, max(trainable, 2) // 2 * 2)
    settings: dict[str, Any] = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch(global_batch, config.accumulation, ranks),
        "gradient_accumulation_steps": config.accumulation,
        # At stage 0 Engine clips, because it needs the norm anyway.
        "gradient_clipping": config.clip_grad if config.zero_stage > 0 else 0.0,
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        # The throughput timer would synchronise with the device before each forward pass and after each step.
        "timers": {"throughput": {"enabled": False}},
    }
    if config.zero_stage == 3:
        settings["zero_optimization"]["stage3_prefetch_bucket_size"] = bucket
    if config.precision != "fp32":
        dtype = str(AUTOCAST_TYPES[config.precision]).removeprefix("torch.")
        # Without lower-precision modules the gradients are reduced in float32.
        settings["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
    return settings
