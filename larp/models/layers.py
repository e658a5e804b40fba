"""Layers and position tables that all networks share, and activation checkpointing and compilation of their blocks.

Shapes: B batch, S sequence, D width.
"""

from __future__ import annotations

import os
import shutil

from larp.kernels.matmul import attention, linear

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from einops import rearrange
from torch import Tensor, nn


def sincos_1d(length: int, dim: int, positions: Tensor | None = None) -> Tensor:
    """Return a (length, dim) float32 table: `[sin, cos]` over dim/2 frequencies 10000^(-i / (dim/2)).

    Tables are computed in float64 and rounded once. Raises ValueError if dim is odd.
    """
    if dim % 2:
        raise ValueError(f"a sin-cos table needs an even width, got {dim}")
    positions = torch.arange(length, dtype=torch.float64) if positions is None else positions.double()
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions[:, None] * omega[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def sincos_3d(grid: tuple[int, int, int], dim: int) -> Tensor:
    """Return a (t*h*w, dim) float32 table: 2-D sin-cos over (h, w) plus 1-D sin-cos over t, patches t-major.

    The first half of the 2-D channels encodes the column, the second half the row. Raises ValueError if dim is not a
    multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a 3-D sin-cos table needs a width that is a multiple of 4, got {dim}")
    t, h, w = grid
    columns = sincos_1d(w, dim // 2)[None].expand(h, w, -1)
    rows = sincos_1d(h, dim // 2)[:, None].expand(h, w, -1)
    plane = torch.cat([columns, rows], dim=-1).reshape(1, h * w, dim)
    return (plane + sincos_1d(t, dim)[:, None]).reshape(t * h * w, dim)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale; computed in float32, returned in the input's dtype."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., D) over the last axis."""
        if x.is_cuda:
            # One kernel, which computes in float32, instead of six over float32 copies.
            with torch.autocast("cuda", enabled=False):
                return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` without autocast's float32 copies of 16-bit inputs on a GPU; its statistics are float32 anyway."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., D) over the last axis."""
        if not x.is_cuda or x.dtype == self.weight.dtype:
            return super().forward(x)
        # autocast would write a float32 copy of the input and of the output; the next layer casts it back.
        with torch.autocast("cuda", enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Linear(nn.Linear):
    """`nn.Linear` by the fastest library on this machine (see `larp.kernels.matmul`)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return linear(x, self.weight, self.bias)


class SwiGLU(nn.Module):
    """LLaMA's feed-forward `w2(silu(w1 x) * w3 x)` without biases."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = Linear(dim, hidden, bias=False)
        self.w3 = Linear(dim, hidden, bias=False)
        self.w2 = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection.

    Args:
        dim, heads: width and number of heads; dim must be a multiple of heads.
        qkv_bias: False in the ViT stacks, True in the prior.
        causal: position i attends to 0..i.
        dropout: of the attention weights and of the output.
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool = False, causal: bool = False, dropout: float = 0.0):
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads = {heads} does not divide the width {dim}")
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D), or to (B, last, D) with queries of the last positions only."""
        if last is None or last == x.shape[1]:
            q, k, v = rearrange(self.qkv(x), "b s (three h d) -> three b h s d", three=3, h=self.heads)
        else:
            if self.causal:
                raise ValueError("`last` needs full attention: leave it out for a causal block")
            dim = x.shape[-1]
            w, b = self.qkv.weight, self.qkv.bias
            q = linear(x[:, -last:], w[:dim], None if b is None else b[:dim])
            q = rearrange(q, "b s (h d) -> b h s d", h=self.heads)
            kv = linear(x, w[dim:], None if b is None else b[dim:])
            k, v = rearrange(kv, "b s (two h d) -> two b h s d", two=2, h=self.heads)
        dropout = self.dropout if self.training else 0.0
        out = attention(q, k, v, self.causal, dropout)
        return F.dropout(self.proj(rearrange(out, "b h s d -> b s (h d)")), self.dropout, self.training)


class Mlp(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return F.dropout(self.fc2(F.gelu(self.fc1(x))), self.dropout, self.training)


class BaseBlock(nn.Module):
    """Base class of the transformer blocks, the unit of activation checkpointing and compilation."""

    checkpointing = False
    """Store only the block's input for the backward pass and recompute the rest: less memory, the same results."""

    def __call__(self, *args, **kwargs):
        """Run `forward`."""
        if self.checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(super().__call__, *args, use_reentrant=False, **kwargs)
        return super().__call__(*args, **kwargs)


class Block(BaseBlock):
    """Pre-norm transformer block: `x + attention(norm1 x)`, then `x + mlp(norm2 x)`. MLP ratio 4; `eps` of the LayerNorms."""

    def __init__(
        self, dim: int, heads: int, eps: float, qkv_bias: bool = False, causal: bool = False, dropout: float = 0.0
    ):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps)
        self.attn = Attention(dim, heads, qkv_bias, causal, dropout)
        self.norm2 = LayerNorm(dim, eps)
        self.mlp = Mlp(dim, 4 * dim, dropout)

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D), or only to its last positions (B, last, D)."""
        residual = x if last is None else x[:, -last:]
        x = residual + self.attn(self.norm1(x), last)
        return x + self.mlp(self.norm2(x))


class Stack(nn.Module):
    """`depth` blocks with full attention that return the last positions only.

    The last block computes queries, output projection and MLP for these positions only.
    """

    def __init__(self, dim: int, heads: int, depth: int):
        super().__init__()
        # The reference uses 1e-6: with 1e-5 the results differ from its golden values by 1.5e-5.
        self.blocks = nn.ModuleList(Block(dim, heads, eps=1e-6) for _ in range(depth))

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """Map (B, S, D) to (B, last, D); None returns all positions."""
        final = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x = block(x, last if i == final else None)
        return x


def embed_patches(conv: nn.Conv3d, clip: Tensor) -> Tensor:
    """Embed the patches of a clip (B, 3, T, H, W) by a convolution whose kernel size equals its stride: (B, P, D), t-major."""
    pt, ph, pw = conv.kernel_size
    patches = rearrange(clip, "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
    # Patches do not overlap, so the convolution is one matrix multiplication.
    return linear(patches, conv.weight.flatten(1), conv.bias)


def init_xavier(module: nn.Module) -> None:
    """Initialise every Linear and Conv3d in `module` like the reference: xavier-uniform (a Conv3d as a matrix), biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv3d):
            nn.init.xavier_uniform_(part.weight.view(part.weight.shape[0], -1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)


# A block is compiled once per sequence length, mode and precision. torch's default limit of 8 counts all blocks together.
_RECOMPILE_LIMIT = 64


def checkpoint_activations(module: nn.Module, name: str = "model") -> None:
    """Enable activation checkpointing of a model's blocks: less memory, the same results.

    Supports larp's models, and models of transformers through their own method. Raises ValueError for any other model.
    """
    # The newer name first: transformers warns about the older one.
    switches = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    switch = next((getattr(module, name) for name in switches if hasattr(module, name)), None)
    blocks = [part for part in module.modules() if isinstance(part, BaseBlock)]
    if switch is not None:
        switch({"use_reentrant": False})
    elif not blocks:
        raise ValueError(f"the {name} has no blocks to checkpoint: leave engine.activation_checkpointing off")
    for block in blocks:
        block.checkpointing = True


def compile_blocks(module: nn.Module, device: torch.device) -> None:
    """Compile a model's blocks in place with torch.compile, or the whole model if it has none of larp's blocks.

    The code between the blocks is not compiled: it samples random numbers and depends on values that change every step.
    Raises ValueError if there is no compiler.
    """
    compilers = (os.environ.get("CXX", "g++"),) if device.type == "cpu" else (os.environ.get("CC", "gcc"), "clang")
    if not any(shutil.which(compiler) for compiler in compilers):
        raise ValueError(
            f"engine.compile needs a compiler, and {' or '.join(compilers)} was not found: install it, or train without"
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    blocks = [part for part in module.modules() if isinstance(part, BaseBlock)]
    for block in blocks:
        # Static shapes: with dynamic ones, recomputation of a checkpointed block could run another compiled version.
        block.compile(dynamic=False)
    if not blocks:
        module.compile()
