"""Speed of the generator's sampler on a GPU: milliseconds per code at positions spread over a clip, beside the rate of a copy."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

from bench.measurements import Measurements, between, busiest, finish, mark, seconds_of
from larp.kernels.packed_linear import Weights
from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.sampling import reused_decoder
from larp.sampling.decoder import Decoder
from larp.sampling.guidance import apply_guidance
from larp.sampling.options import GuidedSampling
from larp.sampling.sample import generate, row_uniforms, sample_logits

import torch
from torch import Tensor

SAMPLING = GuidedSampling(guidance_scale=1.25)


@torch.no_grad()
def sampler(
    model: LarpGenerator,
    clips: int,
    copy: float,
    budget: float,
    captured: bool,
    whole: bool = False,
    weights: Weights = "plain",
) -> dict[str, Any]:
    """Measure milliseconds per code at positions spread over a clip, and the share of the copy's rate at which weights and cache are read."""
    config, device = model.config, model.output.weight.device
    decoder = Decoder(model, 2 * clips, weights=weights, dtype=torch.bfloat16)
    count = config.num_tokens
    uniforms = row_uniforms(0, 0, clips, count).to(device)
    codes = torch.zeros(clips, count, dtype=torch.int64, device=device)

    def choose(logits: Tensor, index: Tensor) -> Tensor:
        logits = apply_guidance(logits, SAMPLING.guidance_scale)
        return sample_logits(logits, SAMPLING, uniforms.index_select(1, index)[:, 0])

    labels = torch.arange(clips, device=device) % config.num_classes
    condition = torch.cat([labels, model.unconditional(labels)])
    figures: dict[str, Any] = {"clips": clips, "captured": captured}
    if weights == "fused":
        from larp.sampling.decoder_tuning import tune

        figures["difference"] = difference(model, decoder, condition)
        # Launch configurations that the decoder has timed.
        figures["tried"] = tune(decoder.fused)
        figures["launch"] = decoder.fused.launch._asdict()
    places = [count * part // 8 for part in (1, 3, 5, 7)]
    each: list[float] = []
    for place in places:
        decoder.prefill(condition)
        decoder.filled = place
        decoder.position.fill_(place)
        run, span = decoder.make_step(codes, choose, captured), decoder._span()
        # The number of codes before the attended length grows.
        most = max(3, min(32, span - place - 4))
        each.append(seconds_of(lambda run=run, span=span: run(span), device, budget / 4, warm=2, most=most))
    mean = sum(each) / len(each)
    itemsize = 2
    matrices = itemsize * sum(
        p.numel() for name, p in model.named_parameters() if name.startswith(("layers.", "output."))
    )
    cache = 2 * itemsize * config.depth * 2 * clips * (sum(places) / len(places)) * config.width
    figures["milliseconds_a_code"] = 1000 * mean
    figures["milliseconds_at"] = {place: 1000 * seconds for place, seconds in zip(places, each, strict=True)}
    figures |= {"seconds_a_clip": mean * count, "clips_a_minute": 60 * clips / (mean * count)}
    figures |= {"bytes_a_code": matrices + cache, "share_of_copy": (matrices + cache) / mean / copy}
    if captured:
        figures["kernels"] = busiest(lambda: run(span), device)
    if whole:

        def clip() -> None:
            decoder.prefill(condition)
            decoder.decode_n(codes, choose)

        figures["seconds_of_a_whole_clip"] = seconds_of(clip, device, 0.0, warm=0, least=1)

        # The first call of `generate` builds a decoder and captures its graphs, the second reuses them.
        marks = [mark(device)]
        for _ in range(2):
            generate(model, labels, SAMPLING, weights=weights, dtype=torch.bfloat16)
            marks.append(mark(device))
        finish(device)
        figures["seconds_of_generate"] = [between(first, second) for first, second in pairwise(marks)]
        reused_decoder.clear()
    return figures


def difference(model: LarpGenerator, decoder: Decoder, condition: Tensor) -> float:
    """Return the largest difference of a decoder's logits from the plain one's over 16 codes, relative to the largest; ValueError above 5 %."""
    plain, worst = Decoder(model, len(condition), weights="plain", dtype=decoder.dtype), 0.0
    for own in (plain, decoder):
        own.prefill(condition)
    for code in range(16):
        codes = torch.full_like(condition, code)
        theirs, ours = plain.decode_one(codes), decoder.decode_one(codes)
        worst = max(worst, ((ours - theirs).abs().max() / theirs.abs().max()).item())
    if not worst <= 0.05:
        raise ValueError(f"the logits differ from the plain decoder's by {worst:.1%} of the largest: nothing was timed")
    return worst


def build_generator(config: GeneratorConfig, device: torch.device) -> LarpGenerator:
    """Return a generator with random weights, those of the head included."""
    torch.manual_seed(0)
    with device:
        model = LarpGenerator(config).eval()
        torch.nn.init.normal_(model.output.weight, std=0.02)
    return model


def samplers(take: Measurements, config: GeneratorConfig, numbers: tuple[int, ...], copy: float, budget: float) -> None:
    """Measure the sampler with torch's kernels, in CUDA graphs and, for the first number of clips, without."""
    model, captured = build_generator(config, take.device), take.device.type == "cuda"
    first, *more = numbers
    take.take(f"sampler, {first} clip", partial(sampler, model, first, copy, budget, captured, whole=True))
    for clips in more:
        take.take(f"sampler, {clips} clips", partial(sampler, model, clips, copy, budget, captured))
    take.take(f"sampler, {first} clip, no graph", partial(sampler, model, first, copy, budget, False))


def fused_sampler(take: Measurements, config: GeneratorConfig, copy: float, budget: float) -> None:
    """Measure the sampler of one clip with the fused kernels, on a GPU; last, because they could break the CUDA context."""
    if take.device.type == "cuda":
        model = build_generator(config, take.device)
        work = partial(sampler, model, 1, copy, budget, True, whole=True, weights="fused")
        take.take("sampler, 1 clip, fused kernels", work)
