"""The loss of a head, in pieces: never more than one piece of logits in memory, and none of a kind that is not scored.

A piece's logits are turned into their own gradient where they stand. Where the weights of the head are at hand, the
gradients are taken in the forward pass at once, so that nothing is computed twice; where ZeRO-3 has cut them up, they
and their gradients belong to the module's own passes, and the pieces are computed again in the backward pass.

Shapes: n positions, H hidden width, C classes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Elements that are worked on at a time: what is needed beside the logits themselves has this size.
_BLOCK = 2**24


class Score(NamedTuple):
    """Sums over positions: what is minimised, the nll in nats, how often the likeliest class was right."""

    loss: Tensor
    nll: Tensor
    correct: Tensor


class Head(NamedTuple):
    """Hidden states (n, H) -> logits (n, C) as parts that lie side by side: `parts_of(hidden)`.

    `weights` are the tensors besides `hidden` that gradients flow to; `cut` says that they are sharded among ranks.
    """

    parts_of: Callable[[Tensor], Sequence[Tensor]]
    weights: tuple[Tensor, ...]
    cut: bool = False


def is_cut(module: nn.Module) -> bool:
    """True if ZeRO-3 has cut up the weights of `module`, which are then whole only while it is called."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def score(head: Head, hidden: Tensor, targets: Tensor, pieces: int, weight: float = 1.0, z_loss: float = 0.0) -> Score:
    """Score hidden states (n, H) against targets int64 (n,), in so many pieces of equal size (some may be empty).

    loss = weight * sum of (nll + z_loss * log(sum of exp(logits))^2), the rest is as it is. The head is called `pieces`
    times whatever n is, 0 too. All sums are in float32, or float64 if the logits are.
    """
    parts = list(zip(hidden.tensor_split(pieces), targets.tensor_split(pieces), strict=True))
    settings = (weight, z_loss)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, *head.weights))):
        scores = [_scored(head.parts_of(h), t, *settings, gradients=False) for h, t in parts]
    elif head.cut:
        scores = [checkpoint(_piece, head, h, t, *settings, use_reentrant=False) for h, t in parts]
    else:
        return Score(*_GradientsInForward.apply(head, parts, settings, hidden, *head.weights))
    return Score(*map(sum, zip(*scores, strict=True)))


class _GradientsInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: Head, pieces: list, settings: tuple, hidden: Tensor, *weights: Tensor):
        wanted = ctx.needs_input_grad[3:]
        of_hidden, of_weights, scores = [], [None] * len(weights), []
        for piece, targets in pieces:
            with torch.enable_grad():
                piece = piece.detach().requires_grad_(wanted[0])
                # A view, since hooks on the inputs of modules refuse leaves inside of autograd.grad.
                parts = head.parts_of(piece.view_as(piece))
            scores.append(_scored(parts, targets, *settings))
            inputs = [tensor for tensor, need in zip((piece, *head.weights), wanted, strict=True) if need]
            ends = [part for part in parts if part.requires_grad]
            with torch.autocast(hidden.device.type, enabled=False):
                found = iter(torch.autograd.grad(ends, inputs, [part.detach() for part in ends]))
            if wanted[0]:
                of_hidden.append(next(found))
            for index, need in enumerate(wanted[1:]):
                if need:
                    one = next(found)
                    of_weights[index] = one if of_weights[index] is None else of_weights[index].add_(one)
            del parts, ends
        ctx.gradients = [torch.cat(of_hidden) if wanted[0] else None, *of_weights]
        loss, nll, correct = map(sum, zip(*scores, strict=True))
        ctx.mark_non_differentiable(nll, correct)
        return loss, nll, correct

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_):
        return None, None, None, *(None if own is None else own * upstream.to(own.dtype) for own in ctx.gradients)


def _piece(head: Head, hidden: Tensor, targets: Tensor, weight: float, z_loss: float):
    return _LossOfParts.apply(targets, weight, z_loss, *head.parts_of(hidden))


class _LossOfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, targets: Tensor, weight: float, z_loss: float, *parts: Tensor):
        loss, nll, correct = _scored(parts, targets, weight, z_loss)
        ctx.save_for_backward(*parts)
        ctx.mark_non_differentiable(nll, correct)
        return loss, nll, correct

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_):
        return None, None, None, *(part.mul_(upstream.to(part.dtype)) for part in ctx.saved_tensors)


@torch.no_grad()
def _scored(
    parts: Sequence[Tensor], targets: Tensor, weight: float, z_loss: float, gradients: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The Score of logits (n, C), which are given in parts; the parts become the gradient of its loss, or scratch."""
    precise = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    rows = max(1, _BLOCK // sum(part.shape[-1] for part in parts))
    totals = [torch.zeros((), dtype=precise, device=targets.device) for _ in range(2)]
    correct = torch.zeros((), dtype=torch.int64, device=targets.device)
    blocks = zip(*(part.detach().split(rows) for part in parts), strict=True)
    for own, target in zip(blocks, targets.split(rows), strict=True):
        logits = [part.to(precise) for part in own]
        best, likeliest = _best(logits)
        chosen = _at(logits, target)
        for part in logits:
            part.sub_(best[:, None]).exp_()
        mass = sum(part.sum(-1) for part in logits)
        log_mass = mass.log() + best
        nll = log_mass - chosen
        totals[0] += weight * (nll + z_loss * log_mass.square()).sum()
        totals[1] += nll.sum()
        correct += (likeliest == target).sum()
        if gradients:
            factor = weight * (1 + 2 * z_loss * log_mass) / mass
            for part in logits:
                part.mul_(factor[:, None])
            _at(logits, target, add=-weight)
            for part, values in zip(own, logits, strict=True):
                part.copy_(values)
    return totals[0], totals[1], correct


def _best(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The largest logit of each row (n,) and its class (n,), of two the first."""
    best, likeliest = parts[0].max(-1)
    first = parts[0].shape[-1]
    for part in parts[1:]:
        value, place = part.max(-1)
        likeliest = torch.where(value > best, place + first, likeliest)
        best = torch.maximum(best, value)
        first += part.shape[-1]
    return best, likeliest


def _at(parts: Sequence[Tensor], classes: Tensor, add: float = 0.0) -> Tensor:
    """The value of each row at its class (n,), after `add` was added to it there."""
    values, first = torch.zeros(len(classes), dtype=parts[0].dtype, device=classes.device), 0
    for part in parts:
        inside = (classes >= first) & (classes < first + part.shape[-1])
        place = (classes - first).clamp(0, part.shape[-1] - 1)[:, None]
        if add:
            part.scatter_add_(-1, place, inside[:, None].to(part.dtype) * add)
        values = torch.where(inside, part.gather(-1, place)[:, 0], values)
        first += part.shape[-1]
    return values
