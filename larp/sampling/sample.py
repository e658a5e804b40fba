"""Sampling codes from an autoregressive model: what a sample may choose from, guidance, and the clips for a condition.

Every random number belongs to a row of the batch: the same seed and row index give the same clip whatever the batch size,
to the last bit on a CPU that can pack its weights. The decoding itself is in larp.sampling.decoder.

Shapes: B rows, N codes, K codebook size.
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from larp.kernels.packed_linear import Weights
from larp.kernels.threads import threads
from larp.sampling.reused_decoder import reused_decoder

import torch
from torch import Tensor

if TYPE_CHECKING:
    from larp.models.generator import LarpGenerator


# What float32 carries without rounding a probability to 0 or a logit to infinity.
COLDEST, HOTTEST, LEAST_TOP_P, MOST_GUIDANCE = 1e-4, 1e6, 1e-6, 1000.0


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance over the codes of a clip; a ValueError names what is out of range."""

    scale: float = 1.0
    """s of `unconditional + s * (conditional - unconditional)`; 1 is off."""
    final: float | None = None
    """Scale of the last guided code, also of a single one, to which it changes in a straight line; None keeps `scale`."""
    start: float = 0.0
    """Codes before this share of the clip are not guided."""
    stop: float = 1.0
    """Codes from this share of the clip on are not guided."""

    def __post_init__(self):
        for name, value in (
            ("guidance", self.scale),
            ("final guidance", self.scale if self.final is None else self.final),
        ):
            if not (_is_finite(value) and 0 <= value <= MOST_GUIDANCE):
                raise ValueError(
                    f"{name} is {value}; it must be a finite number from 0 to {MOST_GUIDANCE:g}, where 1 is off"
                )
        if not (_is_finite(self.start) and _is_finite(self.stop) and 0 <= self.start < self.stop <= 1):
            raise ValueError(
                f"guidance runs from {self.start} to {self.stop}; these are shares of the clip: 0 <= start < stop <= 1"
            )

    def scales(self, count: int) -> Tensor:
        """Return the scale of each of `count` codes, float32; 1 where it is off. ValueError if no code is guided."""
        # A little less, because 0.7 of 10 is 7.000000000000001 in floating point.
        first, last = (math.ceil(share * count - 1e-6) for share in (self.start, self.stop))
        if first >= last:
            raise ValueError(
                f"guidance runs from {self.start} to {self.stop}, which holds none of a clip's {count} codes: move its "
                "start and stop apart"
            )
        scales = torch.ones(count)
        final = self.scale if self.final is None else self.final
        scales[first:last] = torch.linspace(self.scale, final, last - first)
        scales[last - 1] = final
        return scales


def sample_logits(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    uniform: Tensor | None = None,
    min_p: float = 0.0,
) -> Tensor:
    """Draw one id for each row of logits (B, K) by inverting the distribution function at a given uniform number.

    Args:
        logits: (B, K), any float dtype; -inf excludes an id.
        temperature: divides the logits, 1e-4 to 1e6; 0 takes the largest.
        top_k: keep the k likeliest ids, of equal ones the first; 0 keeps all, 1 takes the largest.
        top_p: then keep the likeliest ids that together reach this probability, at least one, 1e-6 to 1; 1.0 keeps all.
        uniform: (B,) in [0, 1), one number for each row; not needed when the largest is taken.
        min_p: then keep the ids that have at least this share of the likeliest one's probability; 0 keeps all.

    Returns:
        int64 (B,), below K whatever the logits. Everything stays on the device of the logits.

    Raises ValueError for an option out of range.
    """
    check_sampling(temperature, top_k, top_p, min_p=min_p)
    if temperature == 0 or top_k == 1:
        return logits.argmax(dim=-1)
    if uniform is None:
        raise ValueError("sampling with temperature > 0 needs `uniform`: one number in [0, 1) for each row")
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        above, tied = logits > kth, logits == kth
        room = top_k - above.sum(dim=-1, keepdim=True)
        logits = logits.masked_fill(~(above | (tied & (tied.cumsum(dim=-1) <= room))), -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p < 1:
        ordered = probabilities.sort(dim=-1, descending=True)
        before = ordered.values.cumsum(dim=-1) - ordered.values
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, ordered.indices, before >= top_p)
        probabilities = probabilities.masked_fill(dropped, 0.0)
    if min_p > 0:
        least = min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    cumulative = probabilities.double().cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Strictly below the total, so that rounding never chooses an id of probability zero behind the last possible one.
    level = torch.minimum(uniform.double()[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # Logits that are NaN have no distribution, and would choose an id behind the last.
    return torch.searchsorted(cumulative, level, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


def check_sampling(
    temperature: float, top_k: int, top_p: float, guidance: float | Guidance = 1.0, min_p: float = 0.0
) -> None:
    """Raise a ValueError that names the sampling option that is out of range, not finite, or no number."""
    if not (_is_finite(temperature) and (temperature == 0 or COLDEST <= temperature <= HOTTEST)):
        raise ValueError(
            f"temperature is {temperature!r}; it must be a finite number: 0 (always the likeliest) or {COLDEST:g} to {HOTTEST:g}"
        )
    if not isinstance(top_k, Integral) or isinstance(top_k, bool) or top_k < 0:
        raise ValueError(f"top_k is {top_k!r}; it must be a whole number: 0 (off) or more")
    if not (_is_finite(top_p) and LEAST_TOP_P <= top_p <= 1):
        raise ValueError(
            f"top_p is {top_p!r}; it must lie in [{LEAST_TOP_P:g}, 1], where 1 is off (top_k 1 takes the likeliest)"
        )
    if not (_is_finite(min_p) and 0 <= min_p <= 1):
        raise ValueError(f"min_p is {min_p}; it must lie in [0, 1], where 0 is off")
    _as_guidance(guidance)


def _as_guidance(guidance: float | Guidance) -> Guidance:
    return guidance if isinstance(guidance, Guidance) else Guidance(guidance)


def _is_finite(value: Any) -> bool:
    # True and False are numbers to Python, and a mistake where a number is meant.
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < math.inf


def row_uniforms(seed: int, first_row: int, rows: int, count: int) -> Tensor:
    """Return float64 (rows, count) in [0, 1): row i depends on (seed, first_row + i), not on the rows beside it."""
    # torch's generator takes 32 bits of its seed: the higher ones must act on those. Smaller seeds stay what they are.
    seed += (seed >> 32) * 0x94D049BB133111EB
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
    guidance: float | Guidance = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    first_row: int = 0,
    weights: Weights = "auto",
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Tensor:
    """Write the codes of one clip for each row of the condition, with the weights that the model has now.

    Args:
        model: the generator; it is left as it is, and dropout does not act whatever its mode.
        condition: class labels int64 (B,), or given codes and separator (B, N + 1).
        guidance: a scale for all codes, or a `Guidance`; 1.0 runs the conditional rows alone.
        temperature, top_k, top_p, min_p: as in `sample_logits`.
        seed, first_row: row i takes the random numbers of (seed, first_row + i): a long list can be made in batches.
        weights, dtype: as in `larp.sampling.decoder.Decoder`.
        progress: show a bar over the codes.

    Returns:
        codes int64 (B, N) on the device of the model.

    On a GPU what a small batch has prepared is kept for the next one, see `larp.sampling.reused_decoder`.

    Raises ValueError for an option out of range, a condition that the model does not know, and guidance of a frame
    prediction that was trained without.
    """
    check_sampling(temperature, top_k, top_p, guidance, min_p)
    check_condition(model, condition)
    device, rows, count = model.tok_embeddings.weight.device, condition.shape[0], model.config.num_tokens
    condition, scales = condition.to(device), _as_guidance(guidance).scales(count)
    guided = bool((scales != 1).any())
    if guided:
        condition = torch.cat([condition, model.unconditional(condition)])
    uniforms, scales = row_uniforms(seed, first_row, rows, count).to(device), scales.to(device)

    options = (rows, guided, temperature, top_k, top_p, min_p)
    with reused_decoder(model, condition.shape[0], weights, dtype) as decoder, threads(decoder.best_threads()):
        if options in decoder.runs:
            run, choose, (codes, *read) = decoder.runs[options]
            for old, new in zip(read, (uniforms, scales), strict=True):
                old.copy_(new)
        else:

            def choose(logits: Tensor, index: Tensor) -> Tensor:
                logits = apply_guidance(logits, scales.index_select(0, index)) if guided else logits
                return sample_logits(logits, temperature, top_k, top_p, uniforms.index_select(1, index)[:, 0], min_p)

            codes = torch.empty(rows, count, dtype=torch.int64, device=device)
            run = decoder.steps(codes, choose, codes.is_cuda)
            decoder.runs[options] = run, choose, (codes, uniforms, scales)
        codes[:, 0] = choose(decoder.prefill(condition), torch.zeros(1, dtype=torch.int64, device=device))
        decoder.run(run, count, progress)
        return codes.clone()


def apply_guidance(logits: Tensor, scale: float | Tensor) -> Tensor:
    """Mix logits (2 B, K), conditional first, to `unconditional + scale * (conditional - unconditional)` (B, K).

    A scale of 1 gives the conditional logits bit for bit.
    """
    conditional, unconditional = logits.chunk(2)
    return torch.lerp(unconditional, conditional, scale)


def check_condition(model: "LarpGenerator", condition: Tensor) -> None:
    """Raise a ValueError if a condition is empty or holds a class or code that the generator does not know."""
    config = model.config
    if condition.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"the condition is {condition.dtype}; classes and codes are whole numbers: give int64")
    if condition.numel() == 0:
        raise ValueError("the condition has no rows: ask for at least one clip")
    low, high = int(condition.min()), int(condition.max())
    limit = config.num_classes if config.task == "class" else config.codebook_size + config.null_condition
    if low < 0 or high > limit:
        kind = "class labels" if config.task == "class" else "condition codes"
        raise ValueError(f"{kind} run from {low} to {high}; this generator knows 0 to {limit}")
