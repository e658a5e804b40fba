"""Float32 matrix multiplication and attention by oneDNN on CPUs where it is faster than torch's default, MKL; attention in
bfloat16 by `bf16_attention` where that is faster.

On processors not made by Intel, MKL uses 256-bit instructions at most. On an AMD EPYC with AVX-512 oneDNN reaches 220 GFLOP/s per
core where MKL reaches 100 (LOG.md). The choice depends on the machine only, never on a measurement, so that results are
reproducible.

Shapes: B batch, H heads, Q queries, S keys, D width of a head.
"""

import platform
from functools import cache
from pathlib import Path

from larp.kernels import bf16_attention

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Multiply-adds below which the overhead of the oneDNN call outweighs its gain.
_MIN_MULTIPLY_ADDS = 1 << 20
# Keys below which torch's fused attention is faster.
_MIN_KEYS = 512
# Queries at a time, so that their attention weights stay in the CPU cache.
_QUERY_CHUNK = 256


@cache
def onednn_is_faster() -> bool:
    """Return whether torch uses MKL here and oneDNN is faster: on x86 processors not made by Intel."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    # A private operator of torch, which torch.compile uses.
    if platform.machine() != "x86_64" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    processor = Path("/proc/cpuinfo")
    return processor.is_file() and "GenuineIntel" not in processor.read_text() and _operator_works()


def _operator_works() -> bool:
    """Return whether the private operator has the expected signature and result in this version of torch."""
    x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    try:
        return torch.equal(_multiply(x, weight), x @ weight.T)
    except (RuntimeError, TypeError):
        return False


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `x @ weight.T + bias` like `F.linear`: x (..., n), weight (m, n), bias (m,), any dtype and device."""
    if not _use_onednn(x, weight) or x.numel() * len(weight) < _MIN_MULTIPLY_ADDS:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight, bias)
    return _multiply(x, weight, bias)


def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, dropout: float = 0.0) -> Tensor:
    """Compute `F.scaled_dot_product_attention` of q (B, H, Q, D) and k, v (B, H, S, D): (B, H, Q, D). Causal needs Q = S."""
    # Neither of our own has a second derivative. Callers that need one disable flash attention.
    if _in_bf16(q, k, v) and torch.backends.cuda.flash_sdp_enabled():
        return bf16_attention.attention(q, k, v, is_causal, dropout)
    if not _use_onednn(q, k) or k.shape[2] < _MIN_KEYS or not torch.backends.cuda.flash_sdp_enabled():
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, dropout_p=dropout)
    return _Attention.apply(q, k, v, is_causal, dropout)


def _use_onednn(x: Tensor, other: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == other.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and onednn_is_faster()
    )


def _in_bf16(*inputs: Tensor) -> bool:
    """Whether torch would compute in bfloat16, on a CPU where our own attention is faster."""
    if inputs[0].device.type != "cpu" or torch.compiler.is_compiling() or not bf16_attention.fused_is_slow():
        return False
    if torch.is_autocast_enabled("cpu"):
        rounded = {torch.float32, torch.bfloat16}
        return torch.get_autocast_dtype("cpu") == torch.bfloat16 and all(x.dtype in rounded for x in inputs)
    return all(x.dtype == torch.bfloat16 for x in inputs)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # For a slice of a matrix's columns oneDNN takes a reference kernel, which is hundreds of times slower.
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """`linear` with a gradient that can itself be differentiated."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_grad = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            linear(grad, weight.t()) if needs_grad[0] else None,
            linear(rows.t(), x.flatten(0, -2).t()) if needs_grad[1] else None,
            rows.sum(0) if needs_grad[2] else None,
        )


class _Attention(torch.autograd.Function):
    """Attention, one head and one chunk of queries at a time, so that the attention weights stay in the CPU cache.

    The backward pass recomputes the weights and the dropout masks: no Q x S tensor is stored.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float) -> Tensor:
        ctx.causal, ctx.dropout = causal, dropout
        ctx.seed = int(torch.randint(1 << 62, ())) if dropout else 0
        generator = torch.Generator().manual_seed(ctx.seed)
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        for head in _heads(q):
            keys, values = k[head] * q.shape[-1] ** -0.5, v[head].t().contiguous()
            for rows, visible in _chunks(q, k, causal):
                weights = _weights(q[head][rows], keys[visible], causal)
                if dropout:
                    weights *= _dropout_mask(weights, dropout, generator)
                out[head][rows] = _multiply(weights, values[:, visible])
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
            dk_t, dv_t = q.new_zeros(2, *keys.t().shape)
            for rows, visible in _chunks(q, k, ctx.causal):
                query, dout = q[head][rows], grad[head][rows].contiguous()
                weights, scores = _weights(query, keys[visible], ctx.causal), _multiply(dout, values[visible])
                dropped = weights
                if ctx.dropout:
                    mask = _dropout_mask(weights, ctx.dropout, generator)
                    dropped, scores = weights * mask, scores.mul_(mask)
                dv_t[:, visible] += _multiply(dout.t(), dropped.t())
                # Gradient of the softmax. The mean of `scores` under the weights equals (dout * out).sum().
                scores.sub_((dout * out[head][rows]).sum(-1, keepdim=True)).mul_(weights)
                dq[head][rows] = _multiply(scores, keys[visible].t())
                dk_t[:, visible] += _multiply(query.t(), scores.t())
            dk[head], dv[head] = dk_t.t() * scale, dv_t.t()
        return dq, dk, dv, None, None


def _heads(q: Tensor) -> list[tuple[int, int]]:
    return [(i, j) for i in range(q.shape[0]) for j in range(q.shape[1])]


def _chunks(q: Tensor, k: Tensor, causal: bool) -> list[tuple[slice, slice]]:
    """Return slices of the queries, each with the slice of the keys that it attends to."""
    stops = [min(start + _QUERY_CHUNK, q.shape[2]) for start in range(0, q.shape[2], _QUERY_CHUNK)]
    starts = [0, *stops[:-1]]
    return [(slice(a, b), slice(0, b if causal else k.shape[2])) for a, b in zip(starts, stops, strict=True)]


def _weights(query: Tensor, keys: Tensor, causal: bool) -> Tensor:
    """Return attention weights (q, S) of queries (q, D) to scaled keys (S, D). Causal: the last query is at the last key."""
    scores = _multiply(query, keys)
    if causal:
        later = torch.ones(scores.shape, dtype=torch.bool).triu_(1 + scores.shape[1] - scores.shape[0])
        scores.masked_fill_(later, float("-inf"))
    return torch.softmax(scores, -1, out=scores)


def _dropout_mask(weights: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    """Sample the factors 0 and 1 / (1 - dropout) of dropout."""
    return torch.empty_like(weights).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
