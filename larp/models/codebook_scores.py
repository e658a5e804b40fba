"""Cross-entropy, ranks and samples over a codebook, in chunks of rows, for training on GPUs.

The scores of all positions and codes are large (2.1 GB in float32 for 256 clips of 256 codes out of 8192), their inputs small (16
values per position). A whole tensor of scores and its gradient would pass through GPU memory about twenty times. Here each chunk
is computed, used and dropped; the forward pass also computes the gradient, which needs the same probabilities.

Shapes: R rows, K codebook size, d code dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Scores per chunk, 1 GB. Smaller chunks mean more kernel launches, which limit a small model on a GPU.
_CHUNK_ELEMENTS = 1 << 28
# Codes per block when sampling: the cumulative sum runs over the sums of blocks, then inside one block.
_BLOCK = 128


class CodeScores(NamedTuple):
    """The result of `score_codes`. Ranks and samples are empty unless requested."""

    loss: Tensor
    """Mean cross-entropy in nats, a scalar."""
    ranks: Tensor
    """int64 (R,): how many codes have a higher score than the target."""
    sampled: Tensor
    """Sampled codes, int64 (R,)."""


def score_codes(
    predictions: Tensor, codebook: Tensor, targets: Tensor, uniform: Tensor | None = None, with_ranks: bool = False
) -> CodeScores:
    """Compute cross-entropy, ranks and samples of the scores `predictions @ codebook.T`; the codebook gets no gradient.

    Args:
        predictions: (R, d) float32.
        codebook: (K, d).
        targets: int64 (R,).
        uniform: (R,) values of U[0, 1); a code is sampled for each row by inverse CDF.
        with_ranks: whether to compute the ranks.
    """
    return CodeScores(*_Scores.apply(predictions, codebook.detach(), targets, uniform, with_ranks))


def rows_per_chunk(codes: int) -> int:
    """Return how many rows of scores over `codes` codes are computed at a time on a GPU."""
    return max(1, _CHUNK_ELEMENTS // codes)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, predictions: Tensor, codebook: Tensor, targets: Tensor, uniform: Tensor | None, with_ranks: bool):
        rows = rows_per_chunk(len(codebook))
        losses, ranks, sampled, gradients = [], [], [], []
        with torch.autocast(predictions.device.type, enabled=False):
            for start in range(0, len(predictions), rows):
                chunk = slice(start, start + rows)
                scores = predictions[chunk] @ codebook.T
                target = targets[chunk, None]
                if with_ranks:
                    ranks.append((scores > scores.gather(1, target)).sum(-1))
                probabilities = scores.softmax(-1)
                # A probability that underflows float32 limits the loss to 87 nats; the gradient is not limited.
                target_probability = probabilities.gather(1, target).clamp_min(torch.finfo(torch.float32).tiny)
                losses.append(-target_probability.log().sum())
                gradients.append(probabilities @ codebook - codebook[targets[chunk]])
                if uniform is not None:
                    sampled.append(sample_in_blocks(probabilities, uniform[chunk]))
        ctx.save_for_backward(torch.cat(gradients) / len(predictions))
        loss, empty = torch.stack(losses).sum() / len(predictions), targets.new_empty(0)
        ranks, sampled = torch.cat([empty, *ranks]), torch.cat([empty, *sampled])
        ctx.mark_non_differentiable(ranks, sampled)
        return loss, ranks, sampled

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):
        (gradients,) = ctx.saved_tensors
        return gradients * grad, None, None, None, None


def sample_in_blocks(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Sample one index per row of (R, K) probabilities by inverse CDF with U[0, 1) values (R,): int64 (R,).

    Equals `larp.models.quantizer.sample_codes` up to rounding, but reads the probabilities once and writes nothing of their size.
    """
    rows, codes = probabilities.shape
    size = _BLOCK if codes % _BLOCK == 0 else codes
    blocks = probabilities.view(rows, -1, size)
    sums = blocks.sum(-1)
    block, rest = _invert(sums, uniform[:, None].to(sums) * sums.sum(-1, keepdim=True))
    within = blocks.gather(1, block[..., None].expand(-1, -1, size))[:, 0]
    index, _ = _invert(within, rest)
    return (block * size + index)[:, 0]


def _invert(weights: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first index (R, 1) where the cumulative sum of weights (R, n) exceeds a level (R, 1), and level - sum before it."""
    cumulative = weights.cumsum(-1)
    # Strictly below the total, so that rounding never selects an index of weight 0 behind the last possible one.
    level = torch.minimum(level, torch.nextafter(cumulative[:, -1:], torch.zeros_like(level)))
    index = torch.searchsorted(cumulative, level, right=True).clamp_max(weights.shape[1] - 1)
    return index, (level - cumulative.gather(1, index) + weights.gather(1, index)).clamp_min(0)
