"""How well a generator predicts held-out codes: bits per code, top-1 and top-5 accuracy.

Shapes: b clips of a batch, N codes of a clip, K codebook size.
"""

import math
from collections.abc import Callable

from larp.data.token_cache import TokenCache
from larp.engine.distributed import Ranks, reduce_sum
from larp.models.generator import code_loss

import torch
from torch import Tensor


@torch.no_grad()
def predict_codes(
    predict: Callable[[Tensor, Tensor], Tensor], cache: TokenCache, task: str, batch_size: int, ranks: Ranks
) -> dict[str, float]:
    """Return bits_per_token, bits_per_clip, top1 and top5 over all clips of a cache. Collective.

    Args:
        predict: maps (codes int64 (b, N), condition) to teacher-forced logits (b, N, K). Every rank calls it equally
            often, as sharded weights require.
        cache, task: the clips, and the kind of their condition.
        batch_size: clips per pass on one rank.
        ranks: this process among those that share the clips.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    own = torch.arange(ranks.rank, len(cache), ranks.world_size)
    for first in range(0, -(-len(cache) // ranks.world_size), batch_size):
        rows = own[first : first + batch_size]
        # A rank without clips in the last pass runs one that is not counted.
        codes, condition = cache.batch(rows if len(rows) else torch.tensor([0]), task, ranks.device)
        logits = predict(codes, condition)
        if not len(rows):
            continue
        likeliest = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == codes[..., None]
        nats = code_loss(logits, codes).item() * codes.numel()
        sums += torch.tensor(
            [nats, likeliest[..., 0].sum().item(), likeliest.sum().item(), codes.numel()], dtype=torch.float64
        )
    nats, top1, top5, count = reduce_sum(sums).tolist()
    bits = nats / count / math.log(2)
    return {
        "bits_per_token": bits,
        "bits_per_clip": bits * cache.num_tokens,
        "top1": top1 / count,
        "top5": top5 / count,
    }
