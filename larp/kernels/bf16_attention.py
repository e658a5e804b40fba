"""Attention in bfloat16 on CPUs that multiply bfloat16, where torch's fused attention reaches a third of the rate of products.

Forward and backward of 6 heads of width 64, 8 sequences of 512, one thread of an AMD EPYC (family 25, model 17): 149 ms by torch,
72 here. Softmax in float32 inside, scores and weights in bfloat16: the relative error against float32 attention of the unrounded
inputs is 0.5 %, where torch's is 0.4 % (LOG.md).

Shapes: N sequences times heads, Q queries, S keys, D width of a head.
"""

import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Keys from which the backward pass recomputes the attention weights: they are then the largest tensors of a block.
_MIN_KEYS_TO_RECOMPUTE = 512
# Queries, and attention weights, at a time, so that the weights stay in the CPU cache.
_QUERY_CHUNK = 256
_WEIGHTS = 1 << 18


@cache
def multiplies_bf16() -> bool:
    """Return whether this CPU has instructions for bfloat16 products and torch's oneDNN uses them."""
    processor = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not torch.backends.mkldnn.is_available() or not processor.is_file():
        return False
    # A private operator of torch, which torch.compile uses.
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and supported() and not {"avx512_bf16", "amx_bf16"}.isdisjoint(_flags(processor))


@cache
def fused_is_slow() -> bool:
    """Return whether torch's fused attention has no bfloat16 products here: it has those of AMX alone."""
    return multiplies_bf16() and "amx_bf16" not in _flags(Path("/proc/cpuinfo"))


def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, dropout: float = 0.0) -> Tensor:
    """Compute `F.scaled_dot_product_attention` of q (B, H, Q, D) and k, v (B, H, S, D) in bfloat16. Causal needs Q = S.

    Inputs of another dtype are rounded first.
    """
    with torch.autocast("cpu", enabled=False):
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
        if k.shape[2] >= _MIN_KEYS_TO_RECOMPUTE:
            return _Attention.apply(q, k, v, is_causal, dropout)
        weights = _mask(q * q.shape[-1] ** -0.5 @ k.mT, is_causal).softmax(-1)
        return F.dropout(weights, dropout) @ v


class _Attention(torch.autograd.Function):
    """Attention, a few heads and a chunk of queries at a time. The backward pass recomputes weights and dropout masks."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float) -> Tensor:
        ctx.shapes, ctx.causal, ctx.dropout = (q.shape, k.shape), causal, dropout
        ctx.seed = int(torch.randint(1 << 62, ())) if dropout else 0
        generator = torch.Generator().manual_seed(ctx.seed)
        query = (q * q.shape[-1] ** -0.5).flatten(0, 1)
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        out = torch.empty_like(query)
        for heads, rows, visible in _chunks(query, k, causal):
            weights = _weights(query[heads, rows], k[heads, visible], causal)
            if dropout:
                weights *= _dropout_mask(weights, dropout, generator)
            out[heads, rows] = torch.bmm(weights, v[heads, visible])
        ctx.save_for_backward(query, k, v)
        return out.view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, k, v = ctx.saved_tensors
        generator = torch.Generator().manual_seed(ctx.seed)
        grad = grad.flatten(0, 1)
        dq = torch.empty_like(query)
        # Sums over chunks of queries.
        dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        for heads, rows, visible in _chunks(query, k, ctx.causal):
            weights, dout = _weights(query[heads, rows], k[heads, visible], ctx.causal), grad[heads, rows]
            dweights = torch.bmm(dout, v[heads, visible].mT)
            dropped = weights
            if ctx.dropout:
                mask = _dropout_mask(weights, ctx.dropout, generator)
                dropped, dweights = weights * mask, dweights.mul_(mask)
            dv[heads, visible] += torch.bmm(dropped.mT, dout)
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            dq[heads, rows] = torch.bmm(dscores, k[heads, visible])
            dk[heads, visible] += torch.bmm(dscores.mT, query[heads, rows])
        dq *= query.shape[-1] ** -0.5
        queries, keys = ctx.shapes
        return dq.view(queries), dk.to(k.dtype).view(keys), dv.to(v.dtype).view(keys), None, None


def _chunks(query: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Yield slices of heads and queries, each with the slice of the keys that they attend to."""
    number, queries, keys = query.shape[0], query.shape[1], k.shape[1]
    rows = min(queries, _QUERY_CHUNK)
    heads = max(1, _WEIGHTS // (rows * keys))
    for head in range(0, number, heads):
        for row in range(0, queries, rows):
            stop = min(row + rows, queries)
            yield slice(head, min(head + heads, number)), slice(row, stop), slice(0, stop if causal else keys)


def _weights(query: Tensor, keys: Tensor, causal: bool) -> Tensor:
    """Return attention weights (n, q, S) of scaled queries (n, q, D) to keys (n, S, D)."""
    scores = _mask(torch.bmm(query, keys.mT), causal)
    return torch.softmax(scores, -1, out=scores)


def _mask(scores: Tensor, causal: bool) -> Tensor:
    """Set scores (..., q, S) of later keys to minus infinity if `causal`: the last query is at the last key."""
    if not causal:
        return scores
    queries = scores.shape[-2]
    scores[..., -queries:].masked_fill_(torch.ones(queries, queries, dtype=torch.bool).triu_(1), float("-inf"))
    return scores


def _dropout_mask(weights: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    """Sample the factors 0 and 1 / (1 - dropout) of dropout."""
    return torch.empty_like(weights).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


def _flags(processor: Path) -> set[str]:
    line = next((line for line in processor.read_text().splitlines() if line.startswith("flags")), "")
    return set(line.partition(":")[2].split())
