"""Reconstruction quality of a tokenizer on real clips, in one command:

    python eval/ucf_rfvd.py --tokenizer runs/ucf/model --data ucf101:ROOT --split test --num-clips 200

Prints and writes PSNR, SSIM, LPIPS (if its weights are found), the Frechet distance with its protocol, codebook usage, and the PSNR
of each clip's mean colour as a lower bound. An MP4 and a PNG beside the JSON show originals left of reconstructions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Literal

from larp.config import to_dict
from larp.data.clips import ClipShape
from larp.data.datasets import VideoSet, open_videos
from larp.data.loader import FixedPass, iterate_once
from larp.engine.signals import run_script
from larp.files import write_json
from larp.metrics import lpips
from larp.metrics.clipsets import skipped_entries
from larp.metrics.evaluation import FrechetConfig, last_lines, run_evaluation
from larp.metrics.frechet import Moments, bootstrap_deviation, frechet_distance, real_floor
from larp.metrics.protocols import PRESETS, Protocol, result, summary
from larp.metrics.reconstruction import ValidationMetrics, reconstruct
from larp.models.tokenizer import LarpTokenizer

import torch
from torch import Tensor
from tqdm import tqdm

_FPS = 25.0


@dataclass(frozen=True)
class RfvdConfig(FrechetConfig):
    """Measure how well a LARP tokenizer reconstructs the clips of a data set."""

    split: Literal["train", "test", "all"] = "test"
    """Which videos; the published rFVD is of the train split."""
    num_clips: int | None = None
    """Videos to measure, one clip of each, sampled by the seed; by default all of them."""
    batch_size: int = 8

    def __post_init__(self):
        super().__post_init__()
        if self.num_clips is not None:
            self.check_at_least(num_clips=1)


def choose_videos(config: RfvdConfig) -> tuple[VideoSet, VideoSet, int]:
    """Return the videos to measure, further ones (perhaps none) for the real-vs-real floor, and the size of the split."""
    videos = open_videos(config.data, config.split)
    items = sorted(videos.items, key=lambda item: item.name)
    wanted = len(items) if config.num_clips is None else config.num_clips
    if wanted > len(items):
        raise ValueError(f"num_clips={wanted}, but the {config.split} split of {config.data} holds {len(items)} videos")
    if wanted < 4:
        raise ValueError(f"{config.data}: a Frechet distance with its floor needs at least 4 videos, got {wanted}")
    order = Random(config.seed).sample(items, min(2 * wanted, len(items)))
    return replace(videos, items=tuple(order[:wanted])), replace(videos, items=tuple(order[wanted:])), len(items)


def one_pass(videos: VideoSet, config: RfvdConfig, shape: ClipShape) -> FixedPass | tuple[()]:
    """Iterate over one clip of every video, with a seeded start, in batches; an empty tuple for an empty set."""
    return iterate_once(videos, shape, config.batch_size, start="random", seed=config.seed) if len(videos) else ()


def skipped_of(once: FixedPass | tuple[()]) -> list[dict[str, str]]:
    """Return the videos that a pass could not read, as entries of a record."""
    return skipped_entries(once.skipped) if once else []


def evaluate(config: RfvdConfig) -> dict:
    """Measure a tokenizer, write the JSON and the pictures, and return the content of the JSON."""
    config.check_paths()
    tokenizer = LarpTokenizer.from_pretrained(config.tokenizer, device=config.device, variant=config.variant)
    features, perceptual = config.open_features(), config.open_lpips()
    shape = ClipShape(*tokenizer.config.clip_shape)
    videos, others, in_split = choose_videos(config)
    metrics = ValidationMetrics(features, perceptual)
    once, more = one_pass(videos, config, shape), one_pass(others, config, shape)
    done = reconstruct(tokenizer, once, examples=config.show, device=config.device, metrics=metrics)
    spare = [features(batch["clip"]) for batch in tqdm(more, desc="real clips", unit="batch", delay=2)]
    protocol = config.protocol(
        PRESETS["larp-ucf101-rfvd"], features, shape, split=config.split, num_videos=in_split, num_clips=len(done.codes),
        height=shape.height, width=shape.width,
    )  # fmt: skip
    report = {
        # The Frechet distance has its own entry, with its protocol.
        **{name: value for name, value in done.metrics.items() if not name.startswith("rfvd")},
        "psnr_above_mean_colour": done.metrics["psnr"] - done.metrics["mean_colour_psnr"],
        "tokens_per_clip": tokenizer.num_tokens,
        "frechet": frechet_record(protocol, metrics, spare, config, {"tokenizer": tokenizer.weight_hash()}),
        "skipped": [*skipped_of(once), *skipped_of(more)],
        "config": to_dict(config),
    }
    report["files"] = list(done.write(str(config.out.with_suffix("")), _FPS)) if config.show else []
    write_json(config.out, report)
    return report


def frechet_record(
    protocol: Protocol, metrics: ValidationMetrics, spare: list[Tensor], config: RfvdConfig, checkpoints: dict[str, str]
) -> dict:
    """Return the record of the Frechet distance; `spare` are features of further real clips, for the real-vs-real floor."""
    real, decoded = torch.cat(metrics.real), torch.cat(metrics.decoded)
    return result(
        protocol,
        frechet_distance(Moments.of(real), Moments.of(decoded)),
        bootstrap_deviation(real, decoded, config.repeats, config.seed, paired=True),
        real_floor(torch.cat([real, *spare]), len(real), config.seed),
        metrics.features,
        checkpoints,
    )


def describe(report: dict) -> str:
    """Return the figures of a report as text to print."""
    lines = [f"PSNR {report['psnr']:.2f} dB ({report['psnr_above_mean_colour']:+.2f} dB against the mean colour's "
             f"{report['mean_colour_psnr']:.2f})"]  # fmt: skip
    lines.append(f"SSIM {report['ssim']:.4f}")
    lines.append(f"LPIPS {report['lpips']:.4f}" if "lpips" in report else "LPIPS: no weights. " + lpips.LPIPS.remedy)
    lines.append(f"codes used {report['codes_used']:.1%}, perplexity {report['perplexity']:.1f}")
    if "prior_top1" in report:
        lines.append(f"prior: top-1 {report['prior_top1']:.1%}, {report['prior_bits']:.2f} bits per token")
    lines.append(summary(report["frechet"]))
    return "\n".join([*lines, *last_lines(report)])


main = partial(run_evaluation, __file__, RfvdConfig, evaluate, describe)

if __name__ == "__main__":
    run_script("ucf_rfvd.py", main)
