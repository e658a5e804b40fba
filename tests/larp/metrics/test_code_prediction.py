"""larp/metrics/code_prediction.py: bits and accuracies by their definition, for every number of ranks."""

import math
from dataclasses import replace

from larp.data.token_cache import TokenCache
from larp.engine.distributed import Ranks
from larp.metrics.code_prediction import predict_codes

import pytest
import torch
import torch.nn.functional as F

ROWS, N, K = 7, 3, 8
CODES = torch.randint(K, (ROWS, N), generator=torch.Generator().manual_seed(0))
CACHE = TokenCache(
    {"num_tokens": N, "codebook_size": K}, CODES, None, torch.arange(ROWS) % 2, torch.arange(ROWS), torch.zeros(ROWS).long(),
    torch.zeros(ROWS).bool(), torch.full((ROWS,), 8.0), ("v",) * ROWS, (None,) * ROWS, ("a", "b"), (), "",
)  # fmt: skip


def sure(codes, labels):
    """The correct code has probability 1 for class 0, and the third rank for the others."""
    right = F.one_hot(codes, K).float()
    others = F.one_hot((codes + 1) % K, K) * 2.0 + F.one_hot((codes + 2) % K, K) * 1.5
    return torch.where(labels[:, None, None] == 0, right * 50, right + others)


def test_scores_follow_their_definition():
    scores = predict_codes(sure, CACHE, "class", 2, Ranks())
    assert scores["top1"] == pytest.approx(4 / 7) and scores["top5"] == 1.0
    unsure = -math.log2(math.e / (math.exp(2) + math.exp(1.5) + math.e + K - 3))
    assert scores["bits_per_token"] == pytest.approx(unsure * 3 / 7, rel=1e-4)
    assert scores["bits_per_clip"] == pytest.approx(N * scores["bits_per_token"])
    even = predict_codes(lambda codes, labels: torch.zeros(*codes.shape, K), CACHE, "class", 4, Ranks())
    assert even["bits_per_token"] == pytest.approx(3) and even["top5"] >= even["top1"]


def test_every_rank_predicts_equally_often_and_counts_its_own_clips():
    """Sharded weights need equal numbers of calls; padding clips are not counted."""
    calls, own = [], []
    for rank in range(3):
        seen = []
        scores = predict_codes(
            lambda c, k, seen=seen: seen.append(len(c)) or sure(c, k), CACHE, "class", 1, Ranks(rank, 3)
        )
        calls.append(len(seen))
        own.append((scores["top1"], len(range(rank, ROWS, 3))))
    assert calls == [3, 3, 3]
    assert sum(top1 * clips for top1, clips in own) / ROWS == pytest.approx(4 / 7)
    short = replace(CACHE, **{name: getattr(CACHE, name)[:4] for name in ("codes", "labels", "videos", "starts")})
    assert predict_codes(sure, short, "class", 1, Ranks(1, 3))["top1"] == 0.0
