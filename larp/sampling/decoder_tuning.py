"""Which way of launching the fused kernels is fastest on this GPU: measured once for a shape in a process, in a few seconds.

The kernels overlap, so none is timed alone: each candidate takes its place in the whole step, as a captured graph. Results do not depend
on the choice, see larp.sampling.decoder_kernels.
"""

import time
from itertools import pairwise

from larp.sampling.decoder_kernels import FusedBlocks, Launch, Shape

import torch

# Smaller models lie in the L2 cache, where there is little to win: bytes of weights.
LEAST_BYTES = 100 * 2**20
# Seconds that all candidates may take; what is left then is not tried.
MOST_SECONDS = 8.0
CANDIDATES: dict[str, tuple] = {
    "gate_ahead": (0.5, 1.0),
    "gate": (Shape(4, 1), Shape(4, 2, 128), Shape(8, 1), Shape(4, 1, 96)),
    "qkv": (Shape(2, 4), Shape(4, 1), Shape(4, 4)),
    "w2": (Shape(2, 2), Shape(8, 1), Shape(4, 1, 80)),
    "wo": (Shape(2, 2), Shape(2, 1)),
    "pdl": (False,),
    "qkv_ahead": (1.0,),
}
# A candidate must be faster by this share: less is chance.
_BETTER = 0.01

_chosen: dict[tuple, tuple[Launch, list]] = {}


def tune(fused: FusedBlocks, search: bool = True) -> list[dict]:
    """Set `launch` of kernels that are ready to run to the fastest; returns what was tried: field, value, milliseconds a step.

    Without `search` only what was found before is set. Nothing is tried for weights below `LEAST_BYTES`. The cache's middle position
    is written.
    """
    weights = sum(one.weight.nbytes for block in fused.blocks for one in (block.qkv, block.wo, block.w13, block.w2))
    if weights < LEAST_BYTES:
        return []
    c, norm = fused.config, fused.norm
    key = (norm.device, norm.dtype, fused.cache.keys.shape, c.ffn_hidden, c.codebook_size, c.norm_eps)
    if key not in _chosen:
        if not search:
            return []
        _chosen[key] = _fastest(fused)
    fused.launch, tried = _chosen[key]
    return tried


def _fastest(fused: FusedBlocks) -> tuple[Launch, list[dict]]:
    began, best = time.monotonic(), fused.launch
    least = milliseconds(fused, best)
    tried = [{"field": "start", "value": str(best), "milliseconds": least}]
    for field, values in CANDIDATES.items():
        chosen = best
        for value in values:
            one = best._replace(**{field: value})
            if one == best or time.monotonic() - began > MOST_SECONDS:
                continue
            try:
                took = milliseconds(fused, one)
            except Exception as error:  # more registers or memory than this GPU has: then it is not this one
                tried.append({"field": field, "value": value, "error": f"{type(error).__name__}: {error}"[:200]})
                continue
            tried.append({"field": field, "value": value, "milliseconds": took})
            if took < least * (1 - _BETTER):
                chosen, least = one, took
        best = chosen
    return best, tried


@torch.no_grad()
def milliseconds(fused: FusedBlocks, launch: Launch, times: int = 12) -> float:
    """Milliseconds of a step at the cache's middle position, launched this way; the median of a graph's replays."""
    fused.launch = launch
    rows, width = fused.queries.shape
    x, place = (
        fused.queries.new_zeros(rows, width),
        torch.full((1,), fused.config.positions // 2, device=fused.norm.device),
    )
    fused(x, place)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        fused(x, place)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    graph.replay()
    marks[0].record()
    for one in marks[1:]:
        graph.replay()
        one.record()
    torch.cuda.synchronize()
    each = sorted(first.elapsed_time(second) for first, second in pairwise(marks))
    return each[times // 2]
