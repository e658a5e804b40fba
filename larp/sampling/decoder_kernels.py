"""The step of one code for one or two rows on a GPU, in five Triton kernels a block: there, reading the weights is all the work.

What torch does in about 16 kernels a block, each too short to reach the memory's rate, is done where the numbers are: norms on the
way into a product, SwiGLU, the residual and the cache's new entries on the way out. Attention reads the place of the newest position
on the device: one captured graph serves all positions.

Where the GPU can launch a kernel while the one before still runs (PDL: compute capability 9.0 on), each reads its weights, which nobody
writes, before it waits for the other's results: the memory has no pause between kernels. Sums are in float32, in an order that no
measurement chooses: what `larp.sampling.decoder_tuning` measures changes no bit.

Shapes: R rows (1 or 2), D width, F inner width of SwiGLU, H heads, L positions of the cache, K codebook size. A program has as many warps
as `WARPS`; each warp makes `EACH` outputs, and has read all their weights before it waits.
"""

# ruff: noqa: RUF005 (Triton knows no unpacking)

from functools import cache as once
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

if TYPE_CHECKING:
    from larp.models.generator import GeneratorConfig
    from larp.sampling.decoder import BlockWeights, KeyValueCache

MOST_ROWS = 2
# Numbers of the keys that one program of attention reads.
_KEYS = 2**13


@triton.jit
def _begin(PDL: tl.constexpr):
    """Let the next kernel start as soon as all programs of this one have."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def _wait(PDL: tl.constexpr):
    """From here on the results of all kernels before are there; what lies before reads only what they do not write."""
    if PDL:
        gdc_wait()


@triton.jit
def _tiles(weight, first, INNER: tl.constexpr, WARPS: tl.constexpr, EACH: tl.constexpr, STEP: tl.constexpr):
    """WARPS * EACH rows of a weight (O, INNER) from `first` on, as a tuple of tiles (WARPS, STEP): a row to a warp."""
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
def _products(
    x, gain, tiles,
    INNER: tl.constexpr, EPS: tl.constexpr, TWO: tl.constexpr, NORM: tl.constexpr, WARPS: tl.constexpr, EACH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Products of `_tiles` with the normed first and, if TWO, second row of x (R, INNER): for each a tuple of EACH (WARPS,)."""
    sums0 = _zeros(EACH, WARPS, STEP)
    sums1 = _zeros(EACH, WARPS, STEP)
    squares0 = tl.zeros((WARPS, STEP), tl.float32)
    squares1 = tl.zeros((WARPS, STEP), tl.float32)
    # Each warp reads x for itself, from the nearest cache: to share it among warps would make them wait.
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
    """Norm, query, key and value; keys and values go to their place in the cache."""
    _begin(PDL)
    first = tl.program_id(0) * WARPS * EACH
    tiles = _tiles(weight, first, WIDTH, WARPS, EACH, STEP)
    _wait(PDL)
    place = tl.load(places).to(tl.int32)
    y0, y1 = _products(x, gain, tiles, WIDTH, EPS, TWO, True, WARPS, EACH, STEP)
    for each in tl.static_range(EACH):
        rows = first + each * WARPS + tl.arange(0, WARPS)
        _store_qkv(y0[each], 0, rows, queries, keys, values, place, LENGTH, WIDTH, HEAD)
        if TWO:
            _store_qkv(y1[each], 1, rows, queries, keys, values, place, LENGTH, WIDTH, HEAD)


@triton.jit
def _ahead(weight, program, PROGRAMS: tl.constexpr, SIZE: tl.constexpr, THREADS: tl.constexpr):
    """Ask for this program's share of a weight's first SIZE numbers, line by line, to be brought into the GPU's L2 cache."""
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
    """One row and head (program 0), and a chunk of the positions (program 1): attention to all positions up to the place.

    Whichever chunk is done last adds up all of them, in their order, and sets the count back.
    """
    _begin(PDL)
    index, split = tl.program_id(0), tl.program_id(1)
    # Neither the place nor what lies before it in the cache is written by this step's kernels.
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
            # Past the nearest cache, which may hold what another layer has left there.
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
    """x (R, OUTER) += weight @ y (R, INNER), in place; the next kernel's weight `later` is asked for meanwhile."""
    _begin(PDL)
    first = tl.program_id(0) * WARPS * EACH
    tiles = _tiles(weight, first, INNER, WARPS, EACH, STEP)
    if AHEAD > 0:
        _ahead(later, tl.program_id(0), OUTER // (WARPS * EACH), AHEAD, 32 * WARPS)
    _wait(PDL)
    y0, y1 = _products(y, y, tiles, INNER, 0.0, TWO, False, WARPS, EACH, STEP)
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
    """Norm, both inner products of SwiGLU, and silu of the one times the other: inner (R, F)."""
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
    y0, y1 = _products(x, gain, both, WIDTH, EPS, TWO, True, WARPS, 2 * EACH, STEP)
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
    """Norm and head: logits (R, K) float32."""
    _begin(PDL)
    first = tl.program_id(0) * WARPS * EACH
    tiles = _tiles(weight, first, WIDTH, WARPS, EACH, STEP)
    _wait(PDL)
    y0, y1 = _products(x, gain, tiles, WIDTH, EPS, TWO, True, WARPS, EACH, STEP)
    for each in tl.static_range(EACH):
        at = logits + first + each * WARPS + tl.arange(0, WARPS)
        tl.store(at, y0[each])
        if TWO:
            tl.store(at + OUTER, y1[each])


class Shape(NamedTuple):
    """How a kernel with weights is cut up: warps of a program, outputs of a warp, and registers of a thread, or as many as it takes."""

    warps: int
    each: int
    registers: int | None = None

    def grid(self, outputs: int) -> tuple[int]:
        """Programs for so many outputs."""
        return (outputs // (self.warps * self.each),)

    def options(self) -> dict[str, int | None]:
        """What the kernel is told."""
        return dict(WARPS=self.warps, EACH=self.each, num_warps=self.warps, maxnreg=self.registers)


class Launch(NamedTuple):
    """How the kernels are launched; no bit of a result depends on it."""

    qkv: Shape = Shape(4, 2)
    wo: Shape = Shape(4, 1)
    gate: Shape = Shape(4, 2)
    w2: Shape = Shape(4, 1)
    head: Shape = Shape(4, 2)
    gate_ahead: float = 0.0
    """The share of SwiGLU's inner weights that the kernel before asks the L2 cache for."""
    qkv_ahead: float = 0.0
    """The same of the next block's weights for query, key and value."""
    pdl: bool = False
    """A kernel starts while the one before still runs."""


class FusedBlocks:
    """All blocks and the head for a single new position of each row, by the kernels above.

    Args:
        config: the generator's; ValueError unless `refusal` finds nothing.
        blocks, norm, head: fused weights, the last norm's (D,) and the head's (K, D), all of one 16- or 32-bit dtype.
        cache: keys and values of that dtype, R of at most `MOST_ROWS`.

    `launch` may be set to another one at any time.
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
        self.chunk = _KEYS // (config.width // config.heads)
        self.splits = -(-cache.keys.shape[3] // self.chunk)
        shape = (rows * config.heads, self.splits)
        self.parts = torch.empty(*shape, config.width // config.heads, device=norm.device)
        self.peaks, self.masses = (torch.empty(shape, device=norm.device) for _ in range(2))
        self.counts = torch.zeros(shape[0], dtype=torch.int32, device=norm.device)
        self.launch = Launch(pdl=norm.is_cuda and can_overlap(norm.device))

    def __call__(self, x: Tensor, place: Tensor) -> Tensor:
        """Read x (R, D), which is used up, at place (1,) int64; return the float32 logits (R, K)."""
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


@once
def can_overlap(device: torch.device) -> bool:
    """Whether this GPU, driver and Triton let a kernel start before the one ahead of it has ended, in a captured graph too."""
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
    except Exception:  # whatever keeps it from working, the kernels work without
        return False


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
    return next(step for step in (256, 128, 64) if inner % step == 0)
