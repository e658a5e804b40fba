"""How a model is trained: sharding, precision, accumulation, clipping; and how DeepSpeed is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from larp.engine.distributed import Ranks

import torch
from torch import nn

AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LARGEST_BUCKET = 200_000_000


@dataclass(frozen=True)
class EngineConfig:
    """How a model is trained: sharding, precision, accumulation, clipping. ValueError for values that cannot work."""

    zero_stage: int = 0
    """ZeRO stage: 0 keeps a copy of everything on each rank, 1 shards optimizer states, 2 gradients, 3 parameters."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the forward pass; weights and gradients stay float32. fp16 works at zero_stage 0 only."""
    accumulation: int = 1
    """Micro batches per rank that make one optimizer step."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    activation_checkpointing: bool = False
    """Compute the insides of blocks again for the gradient rather than keep them: less memory, about a third more work."""
    compile: bool = False
    """torch.compile the blocks (needs a C++ compiler). Checkpoints are the same with and without."""

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage is {self.zero_stage}, expected 0, 1, 2 or 3")
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"precision is '{self.precision}', expected fp32, bf16 or fp16")
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
    """Clips per rank and micro batch: global_batch / (accumulation * world_size); ValueError if that is not whole."""
    parts = accumulation * ranks.world_size
    nearest = max(1, round(global_batch / parts)) * parts
    if global_batch < 1 or global_batch % parts:
        raise ValueError(
            f"batch_size {global_batch} cannot be split into {accumulation} micro batches (accumulation) on "
            f"{ranks.world_size} ranks: it must be a multiple of {parts}, for example {nearest}"
        )
    return global_batch // parts


def deepspeed_settings(module: nn.Module, config: EngineConfig, global_batch: int, ranks: Ranks) -> dict[str, Any]:
    """The configuration that DeepSpeed is given for a module."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    # The default buckets are buffers of 2 GB each, however small the model is.
    # Even, because the sharded optimizers align them to two elements.
    bucket = min(_LARGEST_BUCKET, max(trainable, 2) // 2 * 2)
    settings: dict[str, Any] = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch(global_batch, config.accumulation, ranks),
        "gradient_accumulation_steps": config.accumulation,
        # Stage 0 clips in Engine._guarded_step, which has to know the norm anyway.
        "gradient_clipping": config.clip_grad if config.zero_stage > 0 else 0.0,
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        # It would wait for the device before each forward pass and after each step, to tell a speed that nobody reads.
        "timers": {"throughput": {"enabled": False}},
    }
    if config.zero_stage == 3:
        settings["zero_optimization"]["stage3_prefetch_bucket_size"] = bucket
    if config.precision != "fp32":
        dtype = str(AUTOCAST_TYPES[config.precision]).removeprefix("torch.")
        # An empty list of "safe" modules keeps the gradients float32 while they travel between ranks.
        settings["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
    return settings
