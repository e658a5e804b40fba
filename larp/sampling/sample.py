"""Sampling codes from an autoregressive model: temperature, top-k, top-p, min-p, and the codes of clips.

Every random number belongs to a row of the batch. The same seed and row index give the same clip for any batch size, bit for
bit on a CPU that supports packed weights. Decoding is in larp.sampling.decoder.

Shapes: B rows, N codes, K codebook size.
"""

from typing import TYPE_CHECKING

from larp.kernels.packed_linear import Weights
from larp.kernels.threads import threads
from larp.sampling.options import GuidedSampling, SamplingOptions
from larp.sampling.reused_decoder import reused_decoder

import torch
from torch import Tensor

if TYPE_CHECKING:
    from larp.models.generator import LarpGenerator
from larp.sampling.guidance import apply_guidance, guidance_scales


def sample_logits(
    logits: Tensor, sampling: SamplingOptions = SamplingOptions(), uniform: Tensor | None = None
) -> Tensor:
    """Sample one id for each row of logits (B, K) by inverse CDF.

    The filters apply in the order top_k, top_p, min_p. Nothing is copied between devices.

    Args:
        logits: (B, K), any float dtype; -inf excludes an id.
        sampling: temperature, top_k, top_p and min_p. Temperature 0 and top_k 1 take the largest logit.
        uniform: (B,) in [0, 1); not needed to take the largest logit.

    Returns:
        ids int64 (B,), below K even for NaN logits.
    """
    top_k = sampling.top_k
    if sampling.temperature == 0 or top_k == 1:
        return logits.argmax(dim=-1)
    if uniform is None:
        raise ValueError("sampling with temperature > 0 needs `uniform`: give one number in [0, 1) for each row")
    logits = logits.float() / sampling.temperature
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        above, tied = logits > kth, logits == kth
        room = top_k - above.sum(dim=-1, keepdim=True)
        logits = logits.masked_fill(~(above | (tied & (tied.cumsum(dim=-1) <= room))), -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered = probabilities.sort(dim=-1, descending=True)
        before = ordered.values.cumsum(dim=-1) - ordered.values
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, ordered.indices, before >= sampling.top_p)
        probabilities = probabilities.masked_fill(dropped, 0.0)
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    cumulative = probabilities.double().cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Strictly below the total, so that rounding never selects an id of probability 0 behind the last possible one.
    level = torch.minimum(uniform.double()[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # NaN logits would select id K.
    return torch.searchsorted(cumulative, level, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


def row_uniforms(seed: int, first_row: int, rows: int, count: int) -> Tensor:
    """Sample float64 (rows, count) in [0, 1). Row i depends on (seed, first_row + i) only."""
    # torch's generator uses 32 bits of its seed, so the higher bits are mixed in. Smaller seeds are unchanged.
    seed += (seed >> 32) * 0x94D049BB133111EB
    streams = []
    for row in range(first_row, first_row + rows):
        # Mixed, because similar seeds of a Mersenne twister give similar first numbers.
        mixed = (seed * 0x9E3779B97F4A7C15 + (row + 1) * 0xD1342543DE82EF95) % (1 << 63)
        generator = torch.Generator().manual_seed(mixed)
        streams.append(torch.rand(count, generator=generator, dtype=torch.float64))
    return torch.stack(streams) if streams else torch.empty(0, count, dtype=torch.float64)


@torch.no_grad()
def generate(
    model: "LarpGenerator",
    condition: Tensor,
    sampling: GuidedSampling = GuidedSampling(),
    *,
    seed: int = 0,
    first_row: int = 0,
    weights: Weights = "auto",
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Tensor:
    """Sample the codes of one clip for each row of the condition.

    On a GPU the decoder of a small batch is reused for the next one, see `larp.sampling.reused_decoder`.

    Args:
        model: the generator; it is not modified. Dropout is never applied.
        condition: class labels int64 (B,), or given codes and separator (B, N + 1).
        sampling: the sampling options; without guidance only the conditional logits are computed.
        seed, first_row: row i uses the random numbers of (seed, first_row + i), so that batches can be split.
        weights, dtype: as in `larp.sampling.decoder.Decoder`.
        progress: show a progress bar over the codes.

    Returns:
        codes int64 (B, N) on the device of the model.

    Raises ValueError for guidance that applies to no code, a class or code that the model does not have, and for guidance of a
    frame-prediction model without `null_condition`.
    """
    check_condition(model, condition)
    device, rows, count = model.tok_embeddings.weight.device, condition.shape[0], model.config.num_tokens
    condition, scales = condition.to(device), guidance_scales(sampling, count)
    guided = bool((scales != 1).any())
    if guided:
        condition = torch.cat([condition, model.unconditional(condition)])
    uniforms, scales = row_uniforms(seed, first_row, rows, count).to(device), scales.to(device)

    options = rows, guided, SamplingOptions.of(sampling)
    with reused_decoder(model, condition.shape[0], weights, dtype) as decoder, threads(decoder.best_threads()):
        if options in decoder.saved_steps:
            # A captured step reads the tensors that it was captured with.
            step, choose, (codes, *inputs) = decoder.saved_steps[options]
            for old, new in zip(inputs, (uniforms, scales), strict=True):
                old.copy_(new)
        else:

            def choose(logits: Tensor, index: Tensor) -> Tensor:
                logits = apply_guidance(logits, scales.index_select(0, index)) if guided else logits
                return sample_logits(logits, sampling, uniforms.index_select(1, index)[:, 0])

            codes = torch.empty(rows, count, dtype=torch.int64, device=device)
            step = decoder.make_step(codes, choose, codes.is_cuda)
            decoder.saved_steps[options] = step, choose, (codes, uniforms, scales)
        codes[:, 0] = choose(decoder.prefill(condition), torch.zeros(1, dtype=torch.int64, device=device))
        decoder.run_steps(step, count, progress)
        return codes.clone()


def check_condition(model: "LarpGenerator", condition: Tensor) -> None:
    """Raise ValueError unless a condition has at least one row and only classes or codes of the generator."""
    config = model.config
    if condition.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"the condition is {condition.dtype}; classes and codes are whole numbers: give int64")
    if condition.numel() == 0:
        raise ValueError("the condition has no rows: ask for at least one clip")
    low, high = int(condition.min()), int(condition.max())
    limit = config.num_classes if config.task == "class" else config.codebook_size + config.null_condition
    if low < 0 or high > limit:
        kind = "class labels" if config.task == "class" else "condition codes"
        raise ValueError(f"{kind} run from {low} to {high}; this generator has 0 to {limit}")
