"""Which matrix products a tokenizer needs, and so its floating-point operations; eval/speed.py measures against them.

Two operations for a multiply-add; norms, softmax and activations are left out, and causal attention counts as full attention does
(the conventions of torch.utils.flop_counter). Shapes: B clips, P patches, N tokens, K codebook size, d code dimension, D width.
"""

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

from larp.models.discriminator import DiscriminatorConfig
from larp.models.prior import PriorConfig
from larp.models.tokenizer_config import TokenizerConfig


class Product(NamedTuple):
    """`times` products of (rows, inner) by (inner, columns); `gradients`: how many of its two operands get a gradient."""

    rows: int
    inner: int
    columns: int
    times: int = 1
    gradients: int = 2

    @property
    def flops(self) -> int:
        """Operations of the forward pass."""
        return 2 * self.rows * self.inner * self.columns * self.times


def forward_flops(products: Iterable[Product]) -> int:
    """Operations of a forward pass."""
    return sum(product.flops for product in products)


def training_flops(products: Iterable[Product]) -> int:
    """Operations of a forward and a backward pass: a product for each operand that gets a gradient."""
    return sum(product.flops * (1 + product.gradients) for product in products)


def stack_products(
    width: int, heads: int, depth: int, length: int, last: int, clips: int, pruned: bool, gradients: int = 2
) -> list[Product]:
    """Products of blocks with full attention over `length` positions, of which the last ones are kept.

    Args:
        pruned: the last block asks, projects and runs its MLP for the kept positions alone, as `larp.models.layers.Stack` does.
        gradients: 1 where the weights get none.
    """
    products = []
    for block in range(depth):
        kept = last if pruned and block == depth - 1 else length
        products += [
            Product(kept * clips, width, width, 1, gradients),
            Product(length * clips, width, 2 * width, 1, gradients),
            Product(kept, width // heads, length, heads * clips),
            Product(kept, length, width // heads, heads * clips),
            Product(kept * clips, width, width, 1, gradients),
            Product(kept * clips, width, 4 * width, 1, gradients),
            Product(kept * clips, 4 * width, width, 1, gradients),
        ]
    return products


def encode_products(c: TokenizerConfig, clips: int = 1, pruned: bool = True) -> list[Product]:
    """Products of clips -> codes."""
    patches = prod(c.grid(c.patch_size))
    return [
        Product(patches * clips, 3 * prod(c.patch_size), c.encoder_width, gradients=1),
        *stack_products(
            c.encoder_width, c.encoder_heads, c.encoder_depth, patches + c.num_tokens, c.num_tokens, clips, pruned
        ),
        Product(c.num_tokens * clips, c.encoder_width, c.code_dim),
        Product(c.num_tokens * clips, c.code_dim, c.codebook_size, gradients=0),
    ]


def decode_products(c: TokenizerConfig, clips: int = 1, pruned: bool = True) -> list[Product]:
    """Products of codes -> clips."""
    patch = c.decoder_patch_size or c.patch_size
    patches = prod(c.grid(patch))
    return [
        Product(c.num_tokens * clips, c.code_dim, c.decoder_width),
        *stack_products(
            c.decoder_width, c.decoder_heads, c.decoder_depth, patches + c.num_tokens, patches, clips, pruned
        ),
        Product(patches * clips, c.decoder_width, 3 * prod(patch)),
    ]


def prior_products(c: TokenizerConfig, clips: int = 1) -> list[Product]:
    """Products of the prior in training, all its rounds; none where it is off."""
    prior: PriorConfig = c.prior
    if not prior.enabled:
        return []
    length = c.num_tokens - 1
    once = [
        Product(length * clips, c.code_dim, prior.width),
        *stack_products(prior.width, prior.heads, prior.depth, length, length, clips, pruned=False),
        Product(length * clips, prior.width, c.code_dim),
        Product(length * clips, c.code_dim, c.codebook_size, gradients=1),
    ]
    return once * prior.rounds


def discriminator_products(
    c: DiscriminatorConfig, clips: int, pruned: bool = True, judging: bool = False
) -> list[Product]:
    """Products of the discriminator: learning, or judging for the tokenizer (gradients reach the clip, not the weights)."""
    grid = [a // b for a, b in zip((c.num_frames, c.height, c.width), c.patch_size, strict=True)]
    gradients = 1 if judging else 2
    return [
        Product(prod(grid) * clips, 3 * prod(c.patch_size), c.hidden, gradients=1),
        *stack_products(c.hidden, c.heads, c.depth, prod(grid) + 1, 1, clips, pruned, gradients),
        Product(clips, c.hidden, 1, 1, gradients),
    ]


def step_flops(
    c: TokenizerConfig, adversary: DiscriminatorConfig | None = None, clips: int = 1, pruned: bool = True
) -> int:
    """Operations of a training step: tokenizer, prior, and the discriminator where there is one, which judges and learns."""
    total = training_flops(encode_products(c, clips, pruned) + decode_products(c, clips, pruned))
    total += training_flops(prior_products(c, clips))
    if adversary is not None:
        total += training_flops(discriminator_products(adversary, clips, pruned, judging=True))
        total += training_flops(discriminator_products(adversary, 2 * clips, pruned))
    return total
