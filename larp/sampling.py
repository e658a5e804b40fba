"""Sampling codes from an autoregressive model: prefill the condition, decode one code, decode the other codes.

The cache is an object that the caller sees, and every random number belongs to a row of the batch: the same seed and
row index give the same clip whatever the batch size.

Shapes: B rows, N codes, K codebook size, S new positions, H heads, P cache positions.
"""

import math
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from larp.generator import LarpGenerator


class KeyValueCache:
    """Keys and values of the positions read so far, preallocated for the length that one generation needs.

    Args:
        layers, rows, heads, length, head_dim: the shape of the keys, and of the values.
        dtype, device: those of the keys that will be appended.
    """

    def __init__(self, layers: int, rows: int, heads: int, length: int, head_dim: int, dtype: torch.dtype, device):
        self.keys = torch.empty(layers, rows, heads, length, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.filled = 0

    @classmethod
    def for_generator(cls, model: "LarpGenerator", rows: int) -> "KeyValueCache":
        """Allocate the cache for one pass of `rows` rows through all positions of a generator."""
        config, like = model.config, model.tok_embeddings.weight
        return cls(
            config.depth, rows, config.heads, config.positions, config.width // config.heads, like.dtype, like.device
        )

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, H, S, head_dim) of a layer behind the filled part; return all of that layer so far.

        The new positions count as filled only after `advance`, once all layers have appended theirs.
        """
        end = self.filled + key.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"the cache holds {self.keys.shape[3]} positions, {end} are needed: allocate a longer one")
        self.keys[layer, :, :, self.filled : end] = key
        self.values[layer, :, :, self.filled : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, positions: int) -> None:
        """Count `positions` more as filled."""
        self.filled += positions


def sample_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, uniform: Tensor | None = None
) -> Tensor:
    """Draw one id for each row of logits (B, K) by inverting the distribution function at a given uniform number.

    Args:
        logits: (B, K), any float dtype; -inf excludes an id.
        temperature: divides the logits; 0 takes the largest.
        top_k: keep the k likeliest ids; 0 keeps all, 1 takes the largest.
        top_p: then keep the likeliest ids that together reach this probability, at least one; 1.0 keeps all.
        uniform: (B,) in [0, 1), one number for each row; not needed when the largest is taken.

    Returns:
        int64 (B,). Everything stays on the device of the logits.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0 or top_k == 1:
        return logits.argmax(dim=-1)
    if uniform is None:
        raise ValueError("sampling with temperature > 0 needs `uniform`: one number in [0, 1) for each row")
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p < 1:
        ordered = probabilities.sort(dim=-1, descending=True)
        before = ordered.values.cumsum(dim=-1) - ordered.values
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, ordered.indices, before >= top_p)
        probabilities = probabilities.masked_fill(dropped, 0.0)
    cumulative = probabilities.double().cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Strictly below the total, so that rounding never chooses an id of probability zero behind the last possible one.
    level = torch.minimum(uniform.double()[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, level, right=True)[:, 0]


def check_sampling(temperature: float, top_k: int, top_p: float, guidance: float = 1.0) -> None:
    """Raise a ValueError that names the sampling option that is out of range, not finite, or no number."""
    if not (_is_finite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}; it must be a finite number: 0 (always the likeliest) or more")
    if not isinstance(top_k, Integral) or top_k < 0:
        raise ValueError(f"top_k is {top_k}; it must be a whole number: 0 (off) or more")
    if not (_is_finite(top_p) and 0 < top_p <= 1):
        raise ValueError(f"top_p is {top_p}; it must lie in (0, 1], where 1 is off")
    if not (_is_finite(guidance) and guidance >= 0):
        raise ValueError(f"guidance is {guidance}; it must be a finite number: 0 or more, where 1 is off")


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def row_uniforms(seed: int, first_row: int, rows: int, count: int) -> Tensor:
    """Return float64 (rows, count) in [0, 1): row i depends on (seed, first_row + i), not on the rows beside it."""
    streams = []
    for row in range(first_row, first_row + rows):
        # Mixed, because neighbouring seeds of a Mersenne twister start alike.
        mixed = (seed * 0x9E3779B97F4A7C15 + (row + 1) * 0xD1342543DE82EF95) % (1 << 63)
        generator = torch.Generator().manual_seed(mixed)
        streams.append(torch.rand(count, generator=generator, dtype=torch.float64))
    return torch.stack(streams) if streams else torch.empty(0, count, dtype=torch.float64)


@torch.no_grad()
def generate(
    model: "LarpGenerator",
    condition: Tensor,
    *,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    first_row: int = 0,
    progress: bool = False,
) -> Tensor:
    """Write the codes of one clip for each row of the condition.

    Args:
        model: the generator; it is switched to evaluation mode for the call and back.
        condition: class labels int64 (B,), or given codes and separator (B, N + 1).
        guidance: scale s of `unconditional + s * (conditional - unconditional)`; 1.0 runs the conditional rows alone.
        temperature, top_k, top_p: as in `sample_logits`.
        seed, first_row: row i takes the random numbers of (seed, first_row + i): a long list can be made in batches.
        progress: show a bar over the codes.

    Returns:
        codes int64 (B, N) on the device of the model.
    """
    check_sampling(temperature, top_k, top_p, guidance)
    check_condition(model, condition)
    device, rows, count = model.tok_embeddings.weight.device, condition.shape[0], model.config.num_tokens
    condition = condition.to(device)
    guided = guidance != 1.0
    if guided:
        condition = torch.cat([condition, model.unconditional(condition)])
    uniforms = row_uniforms(seed, first_row, rows, count).to(device)
    cache = KeyValueCache.for_generator(model, condition.shape[0])

    def choose(logits: Tensor, index: int) -> Tensor:
        logits = guide(logits, guidance) if guided else logits
        return sample_logits(logits, temperature, top_k, top_p, uniforms[:, index])

    was_training = model.training
    model.eval()
    try:
        codes = torch.empty(rows, count, dtype=torch.int64, device=device)
        codes[:, 0] = choose(model.prefill(condition, cache), 0)
        decode_n(model, codes, cache, choose, progress)
    finally:
        model.train(was_training)
    return codes


def decode_n(model: "LarpGenerator", codes: Tensor, cache: KeyValueCache, choose, progress: bool = False) -> None:
    """Fill codes (B, N) from position 1 on, in place; `choose(logits, index)` picks the codes (B,) of a position."""
    copies = cache.keys.shape[1] // codes.shape[0]
    for index in tqdm(range(1, codes.shape[1]), desc="codes", disable=not progress, leave=False):
        logits = model.decode_one(codes[:, index - 1].repeat(copies), cache)
        codes[:, index] = choose(logits, index)


def guide(logits: Tensor, scale: float) -> Tensor:
    """Mix logits (2 B, K), conditional first, to `unconditional + scale * (conditional - unconditional)` (B, K)."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def check_condition(model: "LarpGenerator", condition: Tensor) -> None:
    """Raise a ValueError if a condition is empty or holds a class or code that the generator does not know."""
    config = model.config
    if condition.numel() == 0:
        raise ValueError("the condition has no rows: ask for at least one clip")
    low, high = int(condition.min()), int(condition.max())
    limit = config.num_classes if config.task == "class" else config.codebook_size
    if low < 0 or high > limit:
        kind = "class labels" if config.task == "class" else "condition codes"
        raise ValueError(f"{kind} run from {low} to {high}; this generator knows 0 to {limit}")
