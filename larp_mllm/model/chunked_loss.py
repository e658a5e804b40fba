"""Cross-entropy of an output head in chunks: logits exist for one chunk of positions at a time.

The gradient of the logits overwrites them. If the weights of the head are whole, all gradients are computed in the
forward pass, and nothing is computed twice. If ZeRO-3 shards them, they are whole only while the module is called, and
the chunks are computed again in the backward pass.

Shapes: n positions, H hidden width, C classes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Elements of logits per block within a chunk: the size of all temporary tensors.
_BLOCK = 2**24


class LossSums(NamedTuple):
    """Sums over positions: the loss, the negative log-likelihood in nats, how often the likeliest class is the target."""

    loss: Tensor
    nll: Tensor
    correct: Tensor


class OutputHead(NamedTuple):
    """Hidden states (n, H) -> logits (n, C), as tensors (n, C_i) to be concatenated over classes: `project(hidden)`.

    `weights` are the tensors besides `hidden` that get gradients; `sharded` says that ZeRO-3 shards them among ranks.
    """

    project: Callable[[Tensor], Sequence[Tensor]]
    weights: tuple[Tensor, ...]
    sharded: bool = False


def is_sharded(module: nn.Module) -> bool:
    """True if ZeRO-3 shards the weights of `module`, which are then whole only while it is called."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def chunked_cross_entropy(
    head: OutputHead, hidden: Tensor, targets: Tensor, num_chunks: int, weight: float = 1.0, z_loss: float = 0.0
) -> LossSums:
    """Cross-entropy of hidden states (n, H) against targets int64 (n,), in chunks of equal size (some may be empty).

    loss = weight * sum of (nll + z_loss * log(sum of exp(logits))^2). `weight` does not change nll and correct. The
    head is called `num_chunks` times for every n, 0 included. Sums are float32, or float64 if the logits are.
    """
    chunks = list(zip(hidden.tensor_split(num_chunks), targets.tensor_split(num_chunks), strict=True))
    settings = (weight, z_loss)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, *head.weights))):
        sums = [_cross_entropy(head.project(h), t, *settings, gradients=False) for h, t in chunks]
    elif head.sharded:
        sums = [checkpoint(_chunk_loss, head, h, t, *settings, use_reentrant=False) for h, t in chunks]
    else:
        return LossSums(*_GradientsInForward.apply(head, chunks, settings, hidden, *head.weights))
    return LossSums(*map(sum, zip(*sums, strict=True)))


class _GradientsInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: OutputHead, chunks: list, settings: tuple, hidden: Tensor, *weights: Tensor):
        needed = ctx.needs_input_grad[3:]
        of_hidden, of_weights, sums = [], [None] * len(weights), []
        for chunk, targets in chunks:
            with torch.enable_grad():
                chunk = chunk.detach().requires_grad_(needed[0])
                # A view, since hooks on the inputs of modules refuse leaves inside of autograd.grad.
                logits = head.project(chunk.view_as(chunk))
            sums.append(_cross_entropy(logits, targets, *settings))
            inputs = [tensor for tensor, need in zip((chunk, *head.weights), needed, strict=True) if need]
            outputs = [part for part in logits if part.requires_grad]
            with torch.autocast(hidden.device.type, enabled=False):
                # `_cross_entropy` left the gradients in the logits.
                gradients = iter(torch.autograd.grad(outputs, inputs, [part.detach() for part in outputs]))
            if needed[0]:
                of_hidden.append(next(gradients))
            for index, need in enumerate(needed[1:]):
                if need:
                    gradient = next(gradients)
                    of_weights[index] = gradient if of_weights[index] is None else of_weights[index].add_(gradient)
            del logits, outputs
        ctx.gradients = [torch.cat(of_hidden) if needed[0] else None, *of_weights]
        loss, nll, correct = map(sum, zip(*sums, strict=True))
        ctx.mark_non_differentiable(nll, correct)
        return loss, nll, correct

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_):
        return None, None, None, *(None if own is None else own * upstream.to(own.dtype) for own in ctx.gradients)


def _chunk_loss(head: OutputHead, hidden: Tensor, targets: Tensor, weight: float, z_loss: float):
    return _LossOfLogits.apply(targets, weight, z_loss, *head.project(hidden))


class _LossOfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, targets: Tensor, weight: float, z_loss: float, *logits: Tensor):
        loss, nll, correct = _cross_entropy(logits, targets, weight, z_loss)
        ctx.save_for_backward(*logits)
        ctx.mark_non_differentiable(nll, correct)
        return loss, nll, correct

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_):
        return None, None, None, *(part.mul_(upstream.to(part.dtype)) for part in ctx.saved_tensors)


@torch.no_grad()
def _cross_entropy(
    parts: Sequence[Tensor], targets: Tensor, weight: float, z_loss: float, gradients: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The LossSums of logits given in parts (n, C_i).

    The parts are overwritten: with the gradient of the loss, or without `gradients` with intermediate results.
    """
    precise = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    rows = max(1, _BLOCK // sum(part.shape[-1] for part in parts))
    totals = [torch.zeros((), dtype=precise, device=targets.device) for _ in range(2)]
    correct = torch.zeros((), dtype=torch.int64, device=targets.device)
    blocks = zip(*(part.detach().split(rows) for part in parts), strict=True)
    for block, target in zip(blocks, targets.split(rows), strict=True):
        logits = [part.to(precise) for part in block]
        largest, likeliest = _max(logits)
        of_target = _gather(logits, target)
        for part in logits:
            part.sub_(largest[:, None]).exp_()
        exp_sum = sum(part.sum(-1) for part in logits)
        log_sum_exp = exp_sum.log() + largest
        nll = log_sum_exp - of_target
        totals[0] += weight * (nll + z_loss * log_sum_exp.square()).sum()
        totals[1] += nll.sum()
        correct += (likeliest == target).sum()
        if gradients:
            factor = weight * (1 + 2 * z_loss * log_sum_exp) / exp_sum
            for part in logits:
                part.mul_(factor[:, None])
            _gather(logits, target, add=-weight)
            for part, values in zip(block, logits, strict=True):
                part.copy_(values)
    return totals[0], totals[1], correct


def _max(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The largest logit of each row (n,) and its class (n,); of equal ones the first."""
    largest, likeliest = parts[0].max(-1)
    first = parts[0].shape[-1]
    for part in parts[1:]:
        value, index = part.max(-1)
        likeliest = torch.where(value > largest, index + first, likeliest)
        largest = torch.maximum(largest, value)
        first += part.shape[-1]
    return largest, likeliest


def _gather(parts: Sequence[Tensor], classes: Tensor, add: float = 0.0) -> Tensor:
    """The value of each row at its class (n,), after adding `add` to it in place."""
    values, first = torch.zeros(len(classes), dtype=parts[0].dtype, device=classes.device), 0
    for part in parts:
        inside = (classes >= first) & (classes < first + part.shape[-1])
        index = (classes - first).clamp(0, part.shape[-1] - 1)[:, None]
        if add:
            part.scatter_add_(-1, index, inside[:, None].to(part.dtype) * add)
        values = torch.where(inside, part.gather(-1, index)[:, 0], values)
        first += part.shape[-1]
    return values
