"""Tuning of the fused kernels' launch parameters on this GPU: once per shape and process, in a few seconds.

Kernels overlap, so each candidate is timed in a whole step, captured in a CUDA graph. The choice changes no result (see
larp.sampling.decoder_kernels).
"""

import time
from itertools import pairwise

from larp.sampling.decoder_kernels import FusedBlocks, Launch, Shape

import torch

# Bytes of weights below which tuning gains little, because they fit in the L2 cache.
MIN_BYTES = 100 * 2**20
# Seconds after which the remaining candidates are skipped.
TIME_LIMIT = 8.0
CANDIDATES: dict[str, tuple] = {
    "gate_ahead": (0.5, 1.0),
    "gate": (Shape(4, 1), Shape(4, 2, 128), Shape(8, 1), Shape(4, 1, 96)),
    "qkv": (Shape(2, 4), Shape(4, 1), Shape(4, 4)),
    "w2": (Shape(2, 2), Shape(8, 1), Shape(4, 1, 80)),
    "wo": (Shape(2, 2), Shape(2, 1)),
    "pdl": (False,),
    "qkv_ahead": (1.0,),
}
# Share by which a candidate must be faster; less may be noise.
_MIN_GAIN = 0.01

_chosen: dict[tuple, tuple[Launch, list]] = {}


def tune(fused: FusedBlocks, search: bool = True) -> list[dict]:
    """Set `fused.launch` to the fastest parameters; return the candidates as {field, value, milliseconds per step}.

    Without `search` only an earlier result is applied. Weights below `MIN_BYTES` are not tuned. The middle position of the
    key-value cache is overwritten.
    """
    weights = sum(layer.weight.nbytes for block in fused.blocks for layer in (block.qkv, block.wo, block.w13, block.w2))
    if weights < MIN_BYTES:
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
    least = step_milliseconds(fused, best)
    tried = [{"field": "start", "value": str(best), "milliseconds": least}]
    for field, values in CANDIDATES.items():
        chosen = best
        for value in values:
            candidate = best._replace(**{field: value})
            if candidate == best or time.monotonic() - began > TIME_LIMIT:
                continue
            try:
                took = step_milliseconds(fused, candidate)
            except Exception as error:  # it needs more registers or memory than this GPU has
                tried.append({"field": field, "value": value, "error": f"{type(error).__name__}: {error}"[:200]})
                continue
            tried.append({"field": field, "value": value, "milliseconds": took})
            if took < least * (1 - _MIN_GAIN):
                chosen, least = candidate, took
        best = chosen
    return best, tried


@torch.no_grad()
def step_milliseconds(fused: FusedBlocks, launch: Launch, times: int = 12) -> float:
    """Return the median milliseconds of a step at the cache's middle position, over `times` replays of a CUDA graph."""
    fused.launch = launch
    rows, width = fused.queries.shape
    x = fused.queries.new_zeros(rows, width)
    position = torch.full((1,), fused.config.positions // 2, device=fused.norm.device)
    fused(x, position)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        fused(x, position)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return sorted(first.elapsed_time(second) for first, second in pairwise(events))[times // 2]
