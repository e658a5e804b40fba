"""Activation checkpointing and torch.compile, put on a model from outside: its tensors keep their names and values."""

from __future__ import annotations

import os
import shutil

from larp.layers import Repeated

import torch
from torch import nn

# Each length, mode and precision of a block is compiled once; torch's own limit of 8 is for all blocks together.
_VERSIONS = 64


def checkpoint_activations(module: nn.Module, name: str = "model") -> None:
    """Keep only the inputs of a model's blocks for the gradient and compute the rest again: less memory, the same numbers.

    Serves larp's models, and those of transformers by their own switch. Raises ValueError for a model with neither.
    """
    # The newer name first: transformers warns about the older one.
    switches = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    switch = next((getattr(module, name) for name in switches if hasattr(module, name)), None)
    blocks = [part for part in module.modules() if isinstance(part, Repeated)]
    if switch is not None:
        switch({"use_reentrant": False})
    elif not blocks:
        raise ValueError(f"the {name} has no blocks to checkpoint: leave engine.activation_checkpointing off")
    for block in blocks:
        block.checkpointing = True


def compile_blocks(module: nn.Module, device: torch.device) -> None:
    """Compile a model's blocks with torch.compile, in place; of a model that has none of larp's, the whole forward.

    Block by block, since what lies between them draws random numbers and takes numbers that change at every step. Raises
    ValueError where there is no compiler.
    """
    compilers = (os.environ.get("CXX", "g++"),) if device.type == "cpu" else (os.environ.get("CC", "gcc"), "clang")
    if not any(shutil.which(compiler) for compiler in compilers):
        raise ValueError(
            f"engine.compile needs a compiler, and {' or '.join(compilers)} is not there: install it, or train without"
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VERSIONS)
    blocks = [part for part in module.modules() if isinstance(part, Repeated)]
    for block in blocks:
        # One version for each shape: of two that fit, a checkpointed block could take another one the second time.
        block.compile(dynamic=False)
    if not blocks:
        module.compile()
