"""Triton kernels for decoding one code of one or two rows on a GPU: five per block, bound by the time to read the weights.

torch runs about 16 kernels per block, each too short to reach the full memory bandwidth. Here norms are fused into the following
matrix multiplication, and SwiGLU, the residual connection and the update of the key-value cache into the preceding one. Attention
reads the position of the newest code on the device, so that one captured CUDA graph serves all positions.

With programmatic dependent launch (PDL, compute capability 9.0 or newer) a kernel starts while the previous one runs, and reads its
constant weights before it waits for the other's results: memory is read without pauses between kernels. Sums are in float32, and
their order does not depend on the launch parameters: `larp.sampling.decoder_tuning` changes no bit.

Shapes: R rows (1 or 2), D width, F inner width of SwiGLU, H heads, L positions of the cache, K codebook size. A program has `WARPS`
warps. Each warp computes `EACH` outputs and reads all their weights before it waits.
"""

# ruff: noqa: RUF005 (Triton does not support unpacking)

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

if TYPE_CHECKING:
    from larp.models.generator import GeneratorConfig
    from larp.sampling.decoder import BlockWeights, KeyValueCache

MAX_ROWS = 2
# Values of the keys that one program of attention reads.
_CHUNK_ELEMENTS = 2**13


@triton.jit
def _begin(PDL: tl.constexpr):
    """Allow the next kernel to start once all programs of this one have started."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def _wait(PDL: tl.constexpr):
    """Wait for the results of all previous kernels. Code before this call must not read them."""
    if PDL:
        gdc_wait()


@triton.jit
def _tiles(weight, first, INNER: tl.constexpr, WARPS: tl.constexpr, EACH: tl.constexpr, STEP: tl.constexpr):
    """Load WARPS * EACH rows of a weight (O, INNER) from `first` on, as a tuple of tiles (WARPS, STEP): one row per warp."""
    lanes = tl.arange(0, STEP)[None, :]
    rows = first + tl.arange(0, WARPS)[:, None]
    tiles = ()
    for start in tl.static_range(0, INNER, STEP):
        for each in tl.static_range(EACH):
            at = weight + (rows + each * WARPS) * INNER + start + lanes
            tiles = tiles + (tl.load(at, eviction_policy="evict_first"),)
    return tiles


@triton.jit
def _add(sums, tiles, x, first: tl.constexpr, EACH: tl.constexpr):
    added = ()
    for each in tl.static_range(EACH):
        added = added + (sums[each] + tiles[first + each].to(tl.float32) * x,)
    return added


@triton.jit
def _zeros(COUNT: tl.constexpr, WARPS: tl.constexpr, STEP: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros((WARPS, STEP), tl.float32),)
    return zeros


@triton.jit
def _totals(sums, squares, INNER: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr, EACH: tl.constexpr):
    totals = ()
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 1) / INNER + EPS)
    for each in tl.static_range(EACH):
        y = tl.sum(sums[each], 1)
        if NORM:
            y = y * scale
        totals = totals + (y,)
    return totals


@triton.jit
def _multiply(
    x, gain, tiles,
    INNER: tl.constexpr, EPS: tl.constexpr, TWO: tl.constexpr, NORM: tl.constexpr, WARPS: tl.constexpr, EACH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Multiply `_tiles` by the normed first and, if TWO, second row of x (R, INNER): for each a tuple of EACH (WARPS,)."""
    sums0 = _zeros(EACH, WARPS, STEP)
    sums1 = _zeros(EACH, WARPS, STEP)
    squares0 = tl.zeros((WARPS, STEP), tl.float32)
    squares1 = tl.zeros((WARPS, STEP), tl.float32)
    # Each warp reads x itself, from the L1 cache: sharing it would synchronise the warps.
    lanes = tl.arange(0, STEP)[None, :] + tl.zeros((WARPS, 1), tl.int32)
    for part in tl.static_range(INNER // STEP):
        inner = part * STEP + lanes
        x0 = tl.load(x + inner).to(tl.float32)
        if TWO:
            x1 = tl.load(x + INNER + inner).to(tl.float32)
        if NORM:
            g = tl.load(gain + inner).to(tl.float32)
            squares0 += x0 * x0
            x0 = x0 * g
            if TWO:
                squares1 += x1 * x1
                x1 = x1 * g
        sums0 = _add(sums0, tiles, x0, part * EACH, EACH)
        if TWO:
            sums1 = _add(sums1, tiles, x1, part * EACH, EACH)
    y0 = _totals(sums0, squares0, INNER, EPS, NORM, EACH)
    y1 = _totals(sums1, squares1, INNER, EPS, NORM, EACH)
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
    LENGTH: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, EPS: tl.constexpr, TWO: tl.constexpr,
    WARPS: tl.constexpr, EACH: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute norm, query, key and value; store key and value in the cache."""
    _begin(PDL)
    first = tl.program_id(0) * WARPS * EACH
    tiles = _tiles(weight, first, WIDTH, WARPS, EACH, STEP)
    _wait(PDL)
    place = tl.load(places).to(tl.int32)
    y0, y1 = _multiply(x, gain, tiles, WIDTH, EPS, TWO, True, WARPS, EACH, STEP)
    for each in tl.static_range(EACH):
        rows = first + each * WARPS + tl.arange(0, WARPS)
        _store_qkv(y0[each], 0, rows, queries, keys, values, place, LENGTH, WIDTH, HEAD)
        if TWO:
            _store_qkv(y1[each], 1, rows, queries, keys, values, place, LENGTH, WIDTH, HEAD)


@triton.jit
def _ahead(weight, program, PROGRAMS: tl.constexpr, SIZE: tl.constexpr, THREADS: tl.constexpr):
    """Prefetch this program's share of a weight's first SIZE values into the L2 cache, one cache line at a time."""
    LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
    lines: tl.constexpr = SIZE // LINE
    share: tl.constexpr = (lines + PROGRAMS - 1) // PROGRAMS
    for start in range(0, share, THREADS):
        line = tl.minimum(program * share + start + tl.arange(0, THREADS), lines - 1)
        address = (weight + line * LINE).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _attention(
    queries, keys, values, parts, peaks, masses, counts, mixed, places,
    SCALE: tl.constexpr, LENGTH: tl.constexpr, HEAD: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr, MOST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Compute attention of one row and head (program axis 0) to one chunk of the positions up to `place` (program axis 1).

    The program that finishes last adds up all chunks, in their order, and resets the counter.
    """
    _begin(PDL)
    index, split = tl.program_id(0), tl.program_id(1)
    # This step's kernels write neither `places` nor the cache before that position.
    place = tl.load(places).to(tl.int32)
    used = tl.maximum((place + CHUNK - 1) // CHUNK, 1)
    if split < used:
        channels = tl.arange(0, HEAD)
        seen = split * CHUNK + tl.arange(0, CHUNK)
        before = seen < place
        cached = index * LENGTH * HEAD + seen[:, None] * HEAD + channels[None, :]
        key = tl.load(keys + cached, mask=before[:, None], other=0.0)
        value = tl.load(values + cached, mask=before[:, None], other=0.0)
        _wait(PDL)
        query = tl.load(queries + index * HEAD + channels).to(tl.float32) * SCALE
        newest = (index * LENGTH + place) * HEAD + channels
        new_key = tl.load(keys + newest).to(tl.float32)
        new_value = tl.load(values + newest).to(tl.float32)
        score = tl.where(before, tl.sum(key.to(tl.float32) * query[None, :], 1), -1e30)
        new_score = tl.where(split == 0, tl.sum(new_key * query, 0), -1e30)
        peak = tl.maximum(tl.max(score, 0), new_score)
        share = tl.where(before, tl.exp(score - peak), 0.0)
        new_share = tl.where(split == 0, tl.exp(new_score - peak), 0.0)
        out = tl.sum(share[:, None] * value.to(tl.float32), 0) + new_share * new_value
        own = index * SPLITS + split
        tl.store(parts + own * HEAD + channels, out)
        tl.store(peaks + own, peak)
        tl.store(masses + own, tl.sum(share, 0) + new_share)
        tl.debug_barrier()
        done = tl.atomic_add(counts + index, 1, sem="acq_rel")
        if done == used - 1:
            splits = tl.arange(0, MOST)
            there = splits < used
            # Bypasses the L1 cache, which may have stale values of another layer.
            every = tl.load(peaks + index * SPLITS + splits, mask=there, other=-1e30, cache_modifier=".cg")
            mass = tl.load(masses + index * SPLITS + splits, mask=there, other=0.0, cache_modifier=".cg")
            at = (index * SPLITS + splits[:, None]) * HEAD + channels[None, :]
            part = tl.load(parts + at, mask=there[:, None], other=0.0, cache_modifier=".cg")
            weight = tl.where(there, tl.exp(every - tl.max(every, 0)), 0.0)
            total = tl.sum(part * weight[:, None], 0) / tl.sum(mass * weight, 0)
            tl.store(mixed + index * HEAD + channels, total.to(mixed.dtype.element_ty))
            tl.store(counts + index, 0)


@triton.jit
def _linear_add(
    x, y, weight, later,
    INNER: tl.constexpr, OUTER: tl.constexpr, AHEAD: tl.constexpr, TWO: tl.constexpr,
    WARPS: tl.constexpr, EACH: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute x (R, OUTER) += weight @ y (R, INNER) in place, and prefetch `later`, the next kernel's weight."""
    _begin(PDL)
    first = tl.program_id(0) * WARPS * EACH
    tiles = _tiles(weight, first, INNER, WARPS, EACH, STEP)
    if AHEAD > 0:
        _ahead(later, tl.program_id(0), OUTER // (WARPS * EACH), AHEAD, 32 * WARPS)
    _wait(PDL)
    y0, y1 = _multiply(y, y, tiles, INNER, 0.0, TWO, False, WARPS, EACH, STEP)
    for each in tl.static_range(EACH):
        at = x + first + each * WARPS + tl.arange(0, WARPS)
        tl.store(at, (tl.load(at).to(tl.float32) + y0[each]).to(x.dtype.element_ty))
        if TWO:
            tl.store(at + OUTER, (tl.load(at + OUTER).to(tl.float32) + y1[each]).to(x.dtype.element_ty))


@triton.jit
def _silu_times(gate, up):
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit
def _gate(
    x, gain, weight, inner,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, EPS: tl.constexpr, TWO: tl.constexpr,
    WARPS: tl.constexpr, EACH: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute norm, both inner layers of SwiGLU, and silu(gate) * up: inner (R, F)."""
    _begin(PDL)
    first = tl.program_id(0) * WARPS * EACH
    gates = _tiles(weight, first, WIDTH, WARPS, EACH, STEP)
    ups = _tiles(weight, first + HIDDEN, WIDTH, WARPS, EACH, STEP)
    both = ()
    for part in tl.static_range(WIDTH // STEP):
        for each in tl.static_range(EACH):
            both = both + (gates[part * EACH + each],)
        for each in tl.static_range(EACH):
            both = both + (ups[part * EACH + each],)
    _wait(PDL)
    y0, y1 = _multiply(x, gain, both, WIDTH, EPS, TWO, True, WARPS, 2 * EACH, STEP)
    for each in tl.static_range(EACH):
        at = inner + first + each * WARPS + tl.arange(0, WARPS)
        tl.store(at, _silu_times(y0[each], y0[EACH + each]).to(inner.dtype.element_ty))
        if TWO:
            tl.store(at + HIDDEN, _silu_times(y1[each], y1[EACH + each]).to(inner.dtype.element_ty))


@triton.jit
def _norm_linear(
    x, gain, weight, logits,
    WIDTH: tl.constexpr, OUTER: tl.constexpr, EPS: tl.constexpr, TWO: tl.constexpr,
    WARPS: tl.constexpr, EACH: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute norm and head: logits (R, K) float32."""
    _begin(PDL)
    first = tl.program_id(0) * WARPS * EACH
    tiles = _tiles(weight, first, WIDTH, WARPS, EACH, STEP)
    _wait(PDL)
    y0, y1 = _multiply(x, gain, tiles, WIDTH, EPS, TWO, True, WARPS, EACH, STEP)
    for each in tl.static_range(EACH):
        at = logits + first + each * WARPS + tl.arange(0, WARPS)
        tl.store(at, y0[each])
        if TWO:
            tl.store(at + OUTER, y1[each])


class Shape(NamedTuple):
    """Launch parameters of a kernel with weights: warps per program, outputs per warp, and the limit of registers per thread."""

    warps: int
    each: int
    registers: int | None = None

    def grid(self, outputs: int) -> tuple[int]:
        """Return the number of programs for `outputs` outputs."""
        return (outputs // (self.warps * self.each),)

    def options(self) -> dict[str, int | None]:
        """Return the keyword arguments of the kernel."""
        return dict(WARPS=self.warps, EACH=self.each, num_warps=self.warps, maxnreg=self.registers)


class Launch(NamedTuple):
    """Launch parameters of all kernels; no bit of a result depends on them."""

    qkv: Shape = Shape(4, 2)
    wo: Shape = Shape(4, 1)
    gate: Shape = Shape(4, 2)
    w2: Shape = Shape(4, 1)
    head: Shape = Shape(4, 2)
    gate_ahead: float = 0.0
    """Share of SwiGLU's inner weights that the previous kernel prefetches into the L2 cache."""
    qkv_ahead: float = 0.0
    """The same for the next block's query, key and value weights."""
    pdl: bool = False
    """Whether a kernel starts while the previous one runs."""


class FusedBlocks:
    """All blocks and the head for one new position per row, by the kernels above.

    The attribute `launch` may be replaced at any time.

    Args:
        config: of the generator; ValueError if `why_unsupported`.
        blocks, norm, head: fused weights, the last norm's (D,) and the head's (K, D), all of one 16- or 32-bit dtype.
        cache: keys and values of that dtype, of at most `MAX_ROWS` rows.
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
        if reason := why_unsupported(config, rows):
            raise ValueError(f"the fused kernels do not support {reason}: use weights='plain'")
        self.config, self.blocks, self.norm, self.head, self.cache = config, blocks, norm, head, cache
        self.queries, self.mixed = (norm.new_empty(rows, config.width) for _ in range(2))
        self.inner = norm.new_empty(rows, config.ffn_hidden)
        self.chunk = _CHUNK_ELEMENTS // (config.width // config.heads)
        self.splits = -(-cache.keys.shape[3] // self.chunk)
        shape = (rows * config.heads, self.splits)
        self.parts = torch.empty(*shape, config.width // config.heads, device=norm.device)
        self.peaks, self.masses = (torch.empty(shape, device=norm.device) for _ in range(2))
        self.counts = torch.zeros(shape[0], dtype=torch.int32, device=norm.device)
        self.launch = Launch(pdl=norm.is_cuda and can_overlap(norm.device))

    def __call__(self, x: Tensor, place: Tensor) -> Tensor:
        """Run x (R, D), which is overwritten, at position `place` (1,) int64; return float32 logits (R, K)."""
        c, cache, launch, (rows, width) = self.config, self.cache, self.launch, x.shape
        length, head, two = cache.keys.shape[3], width // c.heads, rows == 2
        pdl = dict(PDL=launch.pdl, launch_pdl=launch.pdl)
        wide = dict(STEP=_step(width), EPS=c.norm_eps, TWO=two, WIDTH=width) | pdl
        gate_ahead, qkv_ahead = (
            int(launch.gate_ahead * 2 * c.ffn_hidden) * width,
            int(launch.qkv_ahead * 3 * width) * width,
        )
        for layer, block in enumerate(self.blocks):
            keys, values = cache.keys[layer], cache.values[layer]
            following = self.blocks[min(layer + 1, len(self.blocks) - 1)]
            _qkv[launch.qkv.grid(3 * width)](
                x, block.attention_norm, block.qkv.weight, self.queries, keys, values, place,
                LENGTH=length, HEAD=head, **launch.qkv.options(), **wide,
            )  # fmt: skip
            _attention[(rows * c.heads, self.splits)](
                self.queries, keys, values, self.parts, self.peaks, self.masses, self.counts, self.mixed, place,
                SCALE=head**-0.5, LENGTH=length, HEAD=head, CHUNK=self.chunk, SPLITS=self.splits,
                MOST=triton.next_power_of_2(self.splits), num_warps=4, **pdl,
            )  # fmt: skip
            _linear_add[launch.wo.grid(width)](
                x, self.mixed, block.wo.weight, block.w13.weight,
                INNER=width, OUTER=width, AHEAD=gate_ahead, TWO=two, STEP=_step(width), **launch.wo.options(), **pdl,
            )  # fmt: skip
            _gate[launch.gate.grid(c.ffn_hidden)](
                x, block.ffn_norm, block.w13.weight, self.inner, HIDDEN=c.ffn_hidden, **launch.gate.options(), **wide
            )
            _linear_add[launch.w2.grid(width)](
                x, self.inner, block.w2.weight, following.qkv.weight,
                INNER=c.ffn_hidden, OUTER=width, AHEAD=qkv_ahead, TWO=two, STEP=_step(c.ffn_hidden), **launch.w2.options(), **pdl,
            )  # fmt: skip
        logits = torch.empty(rows, c.codebook_size, dtype=torch.float32, device=x.device)
        _norm_linear[launch.head.grid(c.codebook_size)](
            x, self.norm, self.head, logits, OUTER=c.codebook_size, **launch.head.options(), **wide
        )
        return logits


@triton.jit
def _count_up(x, PDL: tl.constexpr):
    _begin(PDL)
    _wait(PDL)
    tl.store(x, tl.load(x) + 1)


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Return whether GPU, driver and Triton support programmatic dependent launch, also in a captured graph."""
    if torch.cuda.get_device_capability(device) < (9, 0):
        return False
    count = torch.zeros(1, dtype=torch.int32, device=device)
    try:
        with torch.cuda.device(device):
            _count_up[(1,)](count, PDL=True, launch_pdl=True, num_warps=1)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                for _ in range(8):
                    _count_up[(1,)](count, PDL=True, launch_pdl=True, num_warps=1)
            graph.replay()
        return count.item() == 9
    except Exception:  # any failure: the kernels work without it
        return False


def why_unsupported(config: "GeneratorConfig", rows: int) -> str:
    """Return why the kernels do not support a generator and number of rows, or an empty string if they do."""
    head = config.width // config.heads
    if rows > MAX_ROWS:
        return f"{rows} rows (at most {MAX_ROWS})"
    if head & (head - 1) or head < 16:
        return f"heads of width {head} (must be a power of 2, at least 16)"
    for name in ("width", "ffn_hidden", "codebook_size"):
        if getattr(config, name) % 64:
            return f"{name} {getattr(config, name)} (must be a multiple of 64)"
    return ""


def _step(inner: int) -> int:
    """Return how many values of a row a program reads at a time: a power of 2 that divides `inner`."""
    return next(step for step in (256, 128, 64) if inner % step == 0)
