"""The step of one code for one or two rows on a GPU, in five Triton kernels a block: there, reading the weights is all the work.

What torch does in about 16 kernels a block, each too short to reach the memory's rate, is done where the numbers are: norms on the
way into a product, SwiGLU, the residual and the cache's new entries on the way out. Attention reads the place of the newest position
on the device: one captured graph serves all positions. Sums are in float32, in an order that no measurement chooses.

Shapes: R rows (1 or 2), D width, F inner width of SwiGLU, H heads, L positions of the cache, K codebook size.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from larp.decoding import BlockWeights, KeyValueCache
    from larp.generator import GeneratorConfig

MOST_ROWS = 2
# Numbers of the keys that attention reads at a time.
_KEYS = 2**14


@triton.jit
def _norm_scale(squares, INNER: tl.constexpr, EPS: tl.constexpr):
    return tl.rsqrt(tl.sum(squares, 1) / INNER + EPS)


@triton.jit
def _products(
    x,
    gain,
    weight,
    rows,
    INNER: tl.constexpr,
    EPS: tl.constexpr,
    TWO: tl.constexpr,
    NORM: tl.constexpr,
    OUT: tl.constexpr,
    STEP: tl.constexpr,
):
    """Products of the weight's `rows` (OUT,) with the normed first and, if TWO, second row of x (R, INNER): (OUT,) each."""
    sums0 = tl.zeros((OUT, STEP), tl.float32)
    sums1 = tl.zeros((OUT, STEP), tl.float32)
    squares0 = tl.zeros((OUT, STEP), tl.float32)
    squares1 = tl.zeros((OUT, STEP), tl.float32)
    # x is read once for each row of the weight, from the nearest cache: to share it among threads would make them wait.
    again = tl.zeros((OUT, 1), tl.int32)
    for start in tl.static_range(0, INNER, STEP):
        inner = start + tl.arange(0, STEP)[None, :] + again
        w = tl.load(weight + rows[:, None] * INNER + inner).to(tl.float32)
        x0 = tl.load(x + inner).to(tl.float32)
        if NORM:
            g = tl.load(gain + inner).to(tl.float32)
            squares0 += x0 * x0
            x0 = x0 * g
        sums0 += w * x0
        if TWO:
            x1 = tl.load(x + INNER + inner).to(tl.float32)
            if NORM:
                squares1 += x1 * x1
                x1 = x1 * g
            sums1 += w * x1
    y0 = tl.sum(sums0, 1)
    y1 = tl.sum(sums1, 1)
    if NORM:
        y0 = y0 * _norm_scale(squares0, INNER, EPS)
        y1 = y1 * _norm_scale(squares1, INNER, EPS)
    return y0, y1


@triton.jit
def _store_qkv(
    y,
    row: tl.constexpr,
    rows,
    queries,
    keys,
    values,
    place,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
):
    part, channel = rows // WIDTH, rows % WIDTH
    head, lane = channel // HEAD, channel % HEAD
    cached = ((row * (WIDTH // HEAD) + head) * LENGTH + place) * HEAD + lane
    tl.store(queries + row * WIDTH + channel, y.to(queries.dtype.element_ty), mask=part == 0)
    tl.store(keys + cached, y.to(keys.dtype.element_ty), mask=part == 1)
    tl.store(values + cached, y.to(values.dtype.element_ty), mask=part == 2)


@triton.jit
def _qkv(
    x, gain, weight, queries, keys, values, places,
    LENGTH: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, EPS: tl.constexpr, TWO: tl.constexpr, OUT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Norm, query, key and value; keys and values go to their place in the cache."""
    rows = tl.program_id(0) * OUT + tl.arange(0, OUT)
    place = tl.load(places).to(tl.int32)
    y0, y1 = _products(x, gain, weight, rows, WIDTH, EPS, TWO, True, OUT, STEP)
    _store_qkv(y0, 0, rows, queries, keys, values, place, LENGTH, WIDTH, HEAD)
    if TWO:
        _store_qkv(y1, 1, rows, queries, keys, values, place, LENGTH, WIDTH, HEAD)


@triton.jit
def _attention(
    queries,
    keys,
    values,
    mixed,
    places,
    SCALE: tl.constexpr,
    LENGTH: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row and head: attention to all positions up to the place. Each lane keeps a softmax of its own until the end."""
    index = tl.program_id(0)
    place = tl.load(places).to(tl.int32)
    channels = tl.arange(0, HEAD)
    query = tl.load(queries + index * HEAD + channels).to(tl.float32) * SCALE
    best = tl.full((BLOCK,), -1e30, tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK, HEAD), tl.float32)
    for start in range(0, place + 1, BLOCK):
        seen = start + tl.arange(0, BLOCK)
        inside = seen <= place
        cached = index * LENGTH * HEAD + seen[:, None] * HEAD + channels[None, :]
        key = tl.load(keys + cached, mask=inside[:, None], other=0.0).to(tl.float32)
        value = tl.load(values + cached, mask=inside[:, None], other=0.0).to(tl.float32)
        score = tl.where(inside, tl.sum(key * query[None, :], 1), -1e30)
        higher = tl.maximum(best, score)
        shrink = tl.exp(best - higher)
        share = tl.where(inside, tl.exp(score - higher), 0.0)
        mass = mass * shrink + share
        sums = sums * shrink[:, None] + share[:, None] * value
        best = higher
    shrink = tl.exp(best - tl.max(best, 0))
    out = tl.sum(sums * shrink[:, None], 0) / tl.sum(mass * shrink, 0)
    tl.store(mixed + index * HEAD + channels, out.to(mixed.dtype.element_ty))


@triton.jit
def _linear_add(
    x, y, weight, INNER: tl.constexpr, OUTER: tl.constexpr, TWO: tl.constexpr, OUT: tl.constexpr, STEP: tl.constexpr
):
    """x (R, OUTER) += weight @ y (R, INNER), in place."""
    rows = tl.program_id(0) * OUT + tl.arange(0, OUT)
    y0, y1 = _products(y, y, weight, rows, INNER, 0.0, TWO, False, OUT, STEP)
    tl.store(x + rows, (tl.load(x + rows).to(tl.float32) + y0).to(x.dtype.element_ty))
    if TWO:
        tl.store(x + OUTER + rows, (tl.load(x + OUTER + rows).to(tl.float32) + y1).to(x.dtype.element_ty))


@triton.jit
def _gate(
    x, gain, weight, inner,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, EPS: tl.constexpr, TWO: tl.constexpr, OUT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Norm, both inner products of SwiGLU, and silu of the one times the other: inner (R, F)."""
    rows = tl.program_id(0) * OUT + tl.arange(0, OUT)
    gate0, gate1 = _products(x, gain, weight, rows, WIDTH, EPS, TWO, True, OUT, STEP)
    up0, up1 = _products(x, gain, weight, rows + HIDDEN, WIDTH, EPS, TWO, True, OUT, STEP)
    tl.store(inner + rows, (gate0 / (1 + tl.exp(-gate0)) * up0).to(inner.dtype.element_ty))
    if TWO:
        tl.store(inner + HIDDEN + rows, (gate1 / (1 + tl.exp(-gate1)) * up1).to(inner.dtype.element_ty))


@triton.jit
def _norm_linear(
    x, gain, weight, logits,
    WIDTH: tl.constexpr, OUTER: tl.constexpr, EPS: tl.constexpr, TWO: tl.constexpr, OUT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Norm and head: logits (R, K) float32."""
    rows = tl.program_id(0) * OUT + tl.arange(0, OUT)
    y0, y1 = _products(x, gain, weight, rows, WIDTH, EPS, TWO, True, OUT, STEP)
    tl.store(logits + rows, y0)
    if TWO:
        tl.store(logits + OUTER + rows, y1)


class FusedBlocks:
    """All blocks and the head for a single new position of each row, by the kernels above.

    Args:
        config: the generator's; ValueError unless `refusal` finds nothing.
        blocks, norm, head: fused weights, the last norm's (D,) and the head's (K, D), all of one 16- or 32-bit dtype.
        cache: keys and values of that dtype, R of at most `MOST_ROWS`.
    """

    def __init__(
        self,
        config: "GeneratorConfig",
        blocks: list["BlockWeights"],
        norm: Tensor,
        head: Tensor,
        cache: "KeyValueCache",
    ):
        rows = cache.keys.shape[1]
        if why := refusal(config, rows):
            raise ValueError(f"the fused kernels do not serve {why}: take weights='plain'")
        self.config, self.blocks, self.norm, self.head, self.cache = config, blocks, norm, head, cache
        self.queries, self.mixed = (norm.new_empty(rows, config.width) for _ in range(2))
        self.inner = norm.new_empty(rows, config.ffn_hidden)

    def __call__(self, x: Tensor, place: Tensor) -> Tensor:
        """Read x (R, D), which is used up, at place (1,) int64; return the float32 logits (R, K)."""
        c, cache, (rows, width) = self.config, self.cache, x.shape
        length, head = cache.keys.shape[3], width // c.heads
        two, wide, deep = rows == 2, _step(width), _step(c.ffn_hidden)
        common = dict(EPS=c.norm_eps, TWO=two, STEP=wide)
        for layer, block in enumerate(self.blocks):
            keys, values = cache.keys[layer], cache.values[layer]
            _qkv[(3 * width // 8,)](
                x, block.attention_norm, block.qkv.weight, self.queries, keys, values, place,
                LENGTH=length, WIDTH=width, HEAD=head, OUT=8, **common,
            )  # fmt: skip
            _attention[(rows * c.heads,)](
                self.queries, keys, values, self.mixed, place,
                SCALE=head**-0.5, LENGTH=length, HEAD=head, BLOCK=_KEYS // head, num_warps=16,
            )  # fmt: skip
            _linear_add[(width // 4,)](x, self.mixed, block.wo.weight, width, width, two, OUT=4, STEP=wide)
            _gate[(c.ffn_hidden // 4,)](
                x, block.ffn_norm, block.w13.weight, self.inner, WIDTH=width, HIDDEN=c.ffn_hidden, OUT=4, **common
            )
            _linear_add[(width // 4,)](x, self.inner, block.w2.weight, c.ffn_hidden, width, two, OUT=4, STEP=deep)
        logits = torch.empty(rows, c.codebook_size, dtype=torch.float32, device=x.device)
        _norm_linear[(c.codebook_size // 8,)](
            x, self.norm, self.head, logits, WIDTH=width, OUTER=c.codebook_size, OUT=8, **common
        )
        return logits


def refusal(config: "GeneratorConfig", rows: int) -> str:
    """What keeps the kernels from serving a generator and a number of rows, or an empty text."""
    head = config.width // config.heads
    if rows > MOST_ROWS:
        return f"{rows} rows (at most {MOST_ROWS})"
    if head & (head - 1) or head < 16:
        return f"heads of width {head} (a power of 2 from 16 on)"
    for name in ("width", "ffn_hidden", "codebook_size"):
        if getattr(config, name) % 64:
            return f"{name} {getattr(config, name)} (a multiple of 64)"
    return ""


def _step(inner: int) -> int:
    """How many numbers of a row a program reads at a time: a power of 2 that divides it."""
    return next(step for step in (512, 256, 128, 64) if inner % step == 0)
