"""Attention, MLPs, norms and blocks: one copy serves encoder, decoder, prior, discriminator and generator.

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

    Raises ValueError if dim is odd. Tables are computed in float64 and rounded once.
    """
    if dim % 2:
        raise ValueError(f"a sin-cos table needs an even width, got {dim}")
    positions = torch.arange(length, dtype=torch.float64) if positions is None else positions.double()
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions[:, None] * omega[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def sincos_3d(grid: tuple[int, int, int], dim: int) -> Tensor:
    """Return a (t*h*w, dim) float32 table: 2-D sin-cos over (h, w) plus 1-D sin-cos over t, patches t-major.

    The first half of the 2-D channels encodes the column, the second half the row. Raises ValueError unless 4 divides dim.
    """
    if dim % 4:
        raise ValueError(f"a 3-D sin-cos table needs a width that 4 divides, got {dim}")
    t, h, w = grid
    columns = sincos_1d(w, dim // 2)[None].expand(h, w, -1)
    rows = sincos_1d(h, dim // 2)[:, None].expand(h, w, -1)
    plane = torch.cat([columns, rows], dim=-1).reshape(1, h * w, dim)
    return (plane + sincos_1d(t, dim)[:, None]).reshape(t * h * w, dim)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, computed in float32 and returned in the dtype of the input."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., D) over the last axis."""
        if x.is_cuda:
            # One kernel, which computes in float32, in place of six passes over float32 copies.
            with torch.autocast("cuda", enabled=False):
                return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` that takes 16-bit values on a GPU as they are: its statistics are float32 in any case."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., D) over the last axis."""
        if not x.is_cuda or x.dtype == self.weight.dtype:
            return super().forward(x)
        # autocast would write a float32 copy before and another after, which the next product turns back.
        with torch.autocast("cuda", enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Linear(nn.Linear):
    """`nn.Linear` by the library that is fastest on this machine (see `larp.kernels.matmul`)."""

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
        dim, heads: width and heads; heads must divide dim.
        qkv_bias: the ViT stacks have none, the prior has one.
        causal: position i sees 0..i.
        dropout: on the attention weights and on the output.
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool = False, causal: bool = False, dropout: float = 0.0):
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads = {heads} does not divide the width {dim}")
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D), or to (B, last, D): only the last positions ask, all positions answer."""
        if last is None or last == x.shape[1]:
            q, k, v = rearrange(self.qkv(x), "b s (three h d) -> three b h s d", three=3, h=self.heads)
        else:
            if self.causal:
                raise ValueError("`last` serves full attention only")
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


class Repeated(nn.Module):
    """Base of the blocks that stacks are made of: what an engine checkpoints or compiles, from outside the models."""

    checkpointing = False
    """Keep only the block's input for the gradient, and compute the rest again: less memory, the same numbers."""

    def __call__(self, *args, **kwargs):
        """Run `forward`."""
        if self.checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(super().__call__, *args, use_reentrant=False, **kwargs)
        return super().__call__(*args, **kwargs)


class Block(Repeated):
    """A pre-norm transformer block: `x + attention(norm1 x)`, then `x + mlp(norm2 x)`, MLP ratio 4; `eps` is the LayerNorms'."""

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
        kept = x if last is None else x[:, -last:]
        x = kept + self.attn(self.norm1(x), last)
        return x + self.mlp(self.norm2(x))


class Stack(nn.Module):
    """`depth` blocks with full attention, of whose outputs only the last positions are wanted.

    The last block computes queries, output projection and MLP for the wanted positions alone: the others would be thrown away.
    """

    def __init__(self, dim: int, heads: int, depth: int):
        super().__init__()
        # 1e-6 is what the reference's outputs show: with 1e-5 its golden values are missed by 1.5e-5.
        self.blocks = nn.ModuleList(Block(dim, heads, eps=1e-6) for _ in range(depth))

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """Map (B, S, D) to (B, last, D); `last` None keeps all positions."""
        final = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x = block(x, last if i == final else None)
        return x


def embed_patches(conv: nn.Conv3d, clip: Tensor) -> Tensor:
    """Embed the patches of a clip (B, 3, T, H, W) by a convolution whose kernel is its stride: (B, P, D), t-major."""
    pt, ph, pw = conv.kernel_size
    patches = rearrange(clip, "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
    # Kernel and stride are equal: the convolution is one matrix product.
    return linear(patches, conv.weight.flatten(1), conv.bias)


def init_xavier(module: nn.Module) -> None:
    """Initialise every Linear and Conv3d below `module` as the reference does: xavier-uniform (a Conv3d as a matrix), biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv3d):
            nn.init.xavier_uniform_(part.weight.view(part.weight.shape[0], -1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)


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

    Block by block, since what lies between them samples random numbers and takes numbers that change at every step. Raises
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
