"""Float32 matrix products and attention on processors for which torch's first choice of library is the slower one.

torch hands float32 products to MKL, which keeps to 256-bit instructions on any processor but Intel's, however wide its own are.
oneDNN, which torch carries as well, does not: on an AMD EPYC with AVX-512 it does 220 GFLOP/s a core where MKL does 100 (LOG.md).
The choice depends on the machine alone, never on a measurement: a run gives the same numbers again.

Shapes: B batch, H heads, Q queries, S keys, D width of a head.
"""

import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Multiply-adds below which the longer way to oneDNN costs more than it brings.
_SMALL_PRODUCT = 1 << 20
# Keys below which torch's fused attention is the faster one, and queries whose weights stay in the cache.
_FEW_KEYS, _ROWS = 512, 256


@cache
def onednn_is_faster() -> bool:
    """Whether this is a machine where MKL would multiply, and oneDNN does it faster: x86, and not by Intel."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    # The operator that torch.compile uses; torch promises nothing about it.
    if platform.machine() != "x86_64" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    processor = Path("/proc/cpuinfo")
    return processor.is_file() and "GenuineIntel" not in processor.read_text() and _operator_works()


def _operator_works() -> bool:
    """Whether the operator still takes these arguments and gives this product."""
    x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    try:
        return torch.equal(_multiply(x, weight), x @ weight.T)
    except (RuntimeError, TypeError):
        return False


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias` as `F.linear` does: x (..., n), weight (m, n), bias (m,), any dtype and device."""
    if not _takes(x, weight) or x.numel() * len(weight) < _SMALL_PRODUCT:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight, bias)
    return _multiply(x, weight, bias)


def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, dropout: float = 0.0) -> Tensor:
    """Return `F.scaled_dot_product_attention` of q (B, H, Q, D) and k, v (B, H, S, D): (B, H, Q, D); causal only where Q = S."""
    # Where flash attention is switched off, a second derivative is wanted, which there is none of here either.
    if not _takes(q, k) or k.shape[2] < _FEW_KEYS or not torch.backends.cuda.flash_sdp_enabled():
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, dropout_p=dropout)
    return _Attention.apply(q, k, v, is_causal, dropout)


def _takes(x: Tensor, other: Tensor) -> bool:
    """Whether oneDNN should multiply two tensors."""
    return (
        x.device.type == "cpu"
        and x.dtype == other.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and onednn_is_faster()
    )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # A part of the columns of a matrix would go to a reference kernel, which is hundreds of times slower.
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """`linear` with its gradient, which may be differentiated again."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            linear(grad, weight.t()) if wanted[0] else None,
            linear(rows.t(), x.flatten(0, -2).t()) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )


class _Attention(torch.autograd.Function):
    """Attention head by head, some queries at a time, so that their weights never leave the cache.

    The gradient computes the weights, and samples the dropout, again: nothing of size Q x S is kept.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float) -> Tensor:
        ctx.causal, ctx.dropout = causal, dropout
        ctx.seed = int(torch.randint(1 << 62, ())) if dropout else 0
        generator = torch.Generator().manual_seed(ctx.seed)
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        for head in _heads(q):
            keys, values = k[head] * q.shape[-1] ** -0.5, v[head].t().contiguous()
            for rows, seen in _chunks(q, k, causal):
                weights = _weights(q[head][rows], keys[seen], causal)
                if dropout:
                    weights *= _kept(weights, dropout, generator)
                out[head][rows] = _multiply(weights, values[:, seen])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        generator = torch.Generator().manual_seed(ctx.seed)
        scale = q.shape[-1] ** -0.5
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        for head in _heads(q):
            keys, values = k[head] * scale, v[head].contiguous()
            dk_turned, dv_turned = q.new_zeros(2, *keys.t().shape)
            for rows, seen in _chunks(q, k, ctx.causal):
                asked, got = q[head][rows], grad[head][rows].contiguous()
                weights, scores = _weights(asked, keys[seen], ctx.causal), _multiply(got, values[seen])
                used = weights
                if ctx.dropout:
                    kept = _kept(weights, ctx.dropout, generator)
                    used, scores = weights * kept, scores.mul_(kept)
                dv_turned[:, seen] += _multiply(got.t(), used.t())
                # Of the softmax: each weight's gradient less their mean under the weights, which the output holds.
                scores.sub_((got * out[head][rows]).sum(-1, keepdim=True)).mul_(weights)
                dq[head][rows] = _multiply(scores, keys[seen].t())
                dk_turned[:, seen] += _multiply(asked.t(), scores.t())
            dk[head], dv[head] = dk_turned.t() * scale, dv_turned.t()
        return dq, dk, dv, None, None


def _heads(q: Tensor) -> list[tuple[int, int]]:
    return [(i, j) for i in range(q.shape[0]) for j in range(q.shape[1])]


def _chunks(q: Tensor, k: Tensor, causal: bool) -> list[tuple[slice, slice]]:
    """Some queries at a time, and the keys that one of them may see."""
    stops = [min(start + _ROWS, q.shape[2]) for start in range(0, q.shape[2], _ROWS)]
    starts = [0, *stops[:-1]]
    return [(slice(a, b), slice(0, b if causal else k.shape[2])) for a, b in zip(starts, stops, strict=True)]


def _weights(asked: Tensor, keys: Tensor, causal: bool) -> Tensor:
    """Attention weights (q, S) of queries (q, D) for scaled keys (S, D); causal: the last query is that of the last key."""
    scores = _multiply(asked, keys)
    if causal:
        later = torch.ones(scores.shape, dtype=torch.bool).triu_(1 + scores.shape[1] - scores.shape[0])
        scores.masked_fill_(later, float("-inf"))
    return torch.softmax(scores, -1, out=scores)


def _kept(weights: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    """Draw what dropout multiplies weights with."""
    return torch.empty_like(weights).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
