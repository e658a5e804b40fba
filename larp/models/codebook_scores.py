"""Cross-entropy, ranks and samples over a codebook, some rows at a time: what GPUs train with.

Scores of all positions against all codes are large (256 clips of 256 codes of 8192: 2.1 GB in float32) while what makes them is
small (16 numbers a position). Held whole, they and their gradients travel about twenty times between a GPU and its memory; here
each part is made, used and dropped, and the gradient, which needs the same probabilities, is made on the way.

Shapes: R rows, K codebook size, d code dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Scores that exist at a time: 1 GB. Smaller parts are more launches, and those are what a small model on a GPU waits for.
_ELEMENTS = 1 << 28
# Codes whose probabilities are added up first when one is sampled: the running sum then goes over the sums.
_BLOCK = 128


class CodeScores(NamedTuple):
    """loss: mean cross-entropy in nats, a scalar; ranks: int64 (R,), how many codes are likelier than the right one; sampled: int64 (R,).

    The last two are empty where they were not asked for.
    """

    loss: Tensor
    ranks: Tensor
    sampled: Tensor


def rows_at_a_time(codes: int) -> int:
    """How many rows of scores for so many codes a GPU computes at a time."""
    return max(1, _ELEMENTS // codes)


def score_codes(
    predictions: Tensor, codebook: Tensor, targets: Tensor, uniform: Tensor | None = None, ranked: bool = False
) -> CodeScores:
    """Score predictions (R, d) float32 by their products with the codebook (K, d), which gets no gradient.

    Args:
        targets: the right codes, int64 (R,).
        uniform: (R,) values of U[0, 1) by which a code is sampled for each row.
        ranked: whether to count the ranks.
    """
    return CodeScores(*_Scores.apply(predictions, codebook.detach(), targets, uniform, ranked))


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, predictions: Tensor, codebook: Tensor, targets: Tensor, uniform: Tensor | None, ranked: bool):
        rows = rows_at_a_time(len(codebook))
        losses, ranks, sampled, gradients = [], [], [], []
        with torch.autocast(predictions.device.type, enabled=False):
            for start in range(0, len(predictions), rows):
                part = slice(start, start + rows)
                scores = predictions[part] @ codebook.T
                wanted = targets[part, None]
                if ranked:
                    ranks.append((scores > scores.gather(1, wanted)).sum(-1))
                probabilities = scores.softmax(-1)
                # Where even float32 has no number for a probability, the loss stops at 87 nats; the gradient does not.
                chosen = probabilities.gather(1, wanted).clamp_min(torch.finfo(torch.float32).tiny)
                losses.append(-chosen.log().sum())
                gradients.append(probabilities @ codebook - codebook[targets[part]])
                if uniform is not None:
                    sampled.append(sample_in_blocks(probabilities, uniform[part]))
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
    """Draw one index per row of (R, K) probabilities by U[0, 1) values (R,), as `larp.models.quantizer.sample_codes` but for rounding: int64 (R,).

    The probabilities are read once, and nothing of their size is written.
    """
    rows, codes = probabilities.shape
    size = _BLOCK if codes % _BLOCK == 0 else codes
    blocks = probabilities.view(rows, -1, size)
    sums = blocks.sum(-1)
    block, rest = _invert(sums, uniform[:, None].to(sums) * sums.sum(-1, keepdim=True))
    inside = blocks.gather(1, block[..., None].expand(-1, -1, size))[:, 0]
    place, _ = _invert(inside, rest)
    return (block * size + place)[:, 0]


def _invert(weights: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """The first place (R, 1) where the running sum of weights (R, n) exceeds a level (R, 1), and what of the level is left there."""
    running = weights.cumsum(-1)
    # Strictly below the total: rounding never chooses a place of weight 0 behind the last possible one.
    level = torch.minimum(level, torch.nextafter(running[:, -1:], torch.zeros_like(level)))
    place = torch.searchsorted(running, level, right=True).clamp_max(weights.shape[1] - 1)
    return place, (level - running.gather(1, place) + weights.gather(1, place)).clamp_min(0)
