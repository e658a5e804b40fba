"""The matmuls that a tokenizer needs, and so its floating-point operations; eval/speed.py measures against them.

A multiply-add counts as two operations. Norms, softmax and activations do not count. Causal attention counts as full attention
(the conventions of torch.utils.flop_counter). Shapes: B clips, P patches, N tokens, K codebook size, d code dimension, D width.
"""

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

from larp.models.discriminator import DiscriminatorConfig
from larp.models.prior import PriorConfig
from larp.models.tokenizer_config import TokenizerConfig


class Matmul(NamedTuple):
    """`times` matmuls of (rows, inner) by (inner, columns), of whose two operands `gradients` get a gradient."""

    rows: int
    inner: int
    columns: int
    times: int = 1
    gradients: int = 2

    @property
    def flops(self) -> int:
        """Operations of the forward pass."""
        return 2 * self.rows * self.inner * self.columns * self.times


def forward_flops(matmuls: Iterable[Matmul]) -> int:
    """Operations of a forward pass."""
    return sum(matmul.flops for matmul in matmuls)


def training_flops(matmuls: Iterable[Matmul]) -> int:
    """Operations of a forward and a backward pass: a matmul for each operand that gets a gradient."""
    return sum(matmul.flops * (1 + matmul.gradients) for matmul in matmuls)


def stack_matmuls(
    width: int, heads: int, depth: int, length: int, last: int, clips: int, pruned: bool, gradients: int = 2
) -> list[Matmul]:
    """Matmuls of blocks with full attention over `length` positions, of which the last `last` are used.

    Args:
        pruned: the last block computes queries, projections and MLP of the used positions alone, as `larp.models.layers.Stack` does.
        gradients: 1 where the weights get none.
    """
    matmuls = []
    for block in range(depth):
        used = last if pruned and block == depth - 1 else length
        matmuls += [
            Matmul(used * clips, width, width, 1, gradients),
            Matmul(length * clips, width, 2 * width, 1, gradients),
            Matmul(used, width // heads, length, heads * clips),
            Matmul(used, length, width // heads, heads * clips),
            Matmul(used * clips, width, width, 1, gradients),
            Matmul(used * clips, width, 4 * width, 1, gradients),
            Matmul(used * clips, 4 * width, width, 1, gradients),
        ]
    return matmuls


def encode_matmuls(c: TokenizerConfig, clips: int = 1, pruned: bool = True) -> list[Matmul]:
    """Matmuls of clips -> codes."""
    patches = prod(c.grid(c.patch_size))
    return [
        Matmul(patches * clips, 3 * prod(c.patch_size), c.encoder_width, gradients=1),
        *stack_matmuls(
            c.encoder_width, c.encoder_heads, c.encoder_depth, patches + c.num_tokens, c.num_tokens, clips, pruned
        ),
        Matmul(c.num_tokens * clips, c.encoder_width, c.code_dim),
        Matmul(c.num_tokens * clips, c.code_dim, c.codebook_size, gradients=0),
    ]


def decode_matmuls(c: TokenizerConfig, clips: int = 1, pruned: bool = True) -> list[Matmul]:
    """Matmuls of codes -> clips."""
    patch = c.decoder_patch_size or c.patch_size
    patches = prod(c.grid(patch))
    return [
        Matmul(c.num_tokens * clips, c.code_dim, c.decoder_width),
        *stack_matmuls(
            c.decoder_width, c.decoder_heads, c.decoder_depth, patches + c.num_tokens, patches, clips, pruned
        ),
        Matmul(patches * clips, c.decoder_width, 3 * prod(patch)),
    ]


def prior_matmuls(c: TokenizerConfig, clips: int = 1) -> list[Matmul]:
    """Matmuls of the prior in training, all its rounds; none where it is off."""
    prior: PriorConfig = c.prior
    if not prior.enabled:
        return []
    length = c.num_tokens - 1
    once = [
        Matmul(length * clips, c.code_dim, prior.width),
        *stack_matmuls(prior.width, prior.heads, prior.depth, length, length, clips, pruned=False),
        Matmul(length * clips, prior.width, c.code_dim),
        Matmul(length * clips, c.code_dim, c.codebook_size, gradients=1),
    ]
    return once * prior.rounds


def discriminator_matmuls(
    c: DiscriminatorConfig, clips: int, pruned: bool = True, frozen: bool = False
) -> list[Matmul]:
    """Matmuls of the discriminator; `frozen` in the step of the tokenizer, where gradients reach the clip and not the weights."""
    grid = [a // b for a, b in zip((c.num_frames, c.height, c.width), c.patch_size, strict=True)]
    gradients = 1 if frozen else 2
    return [
        Matmul(prod(grid) * clips, 3 * prod(c.patch_size), c.hidden, gradients=1),
        *stack_matmuls(c.hidden, c.heads, c.depth, prod(grid) + 1, 1, clips, pruned, gradients),
        Matmul(clips, c.hidden, 1, 1, gradients),
    ]


def step_flops(
    c: TokenizerConfig, adversary: DiscriminatorConfig | None = None, clips: int = 1, pruned: bool = True
) -> int:
    """Operations of a training step: tokenizer, prior and, where there is one, the discriminator, once frozen and once trained."""
    total = training_flops(encode_matmuls(c, clips, pruned) + decode_matmuls(c, clips, pruned))
    total += training_flops(prior_matmuls(c, clips))
    if adversary is not None:
        total += training_flops(discriminator_matmuls(adversary, clips, pruned, frozen=True))
        total += training_flops(discriminator_matmuls(adversary, 2 * clips, pruned))
    return total
