"""Reconstruction quality of a tokenizer on real clips, in one command:

    python eval/ucf_rfvd.py --tokenizer runs/ucf/model --data ucf101:ROOT --split test --num-clips 200

Prints and writes PSNR, SSIM, LPIPS (where its weights are at hand), the Frechet distance with its protocol, codebook
usage, and the PSNR of painting every clip in its mean colour; beside the JSON, an MP4 of originals left of
reconstructions, and a PNG.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Literal

from larp.config import parse, to_dict
from larp.data.clips import ClipShape
from larp.data.datasets import VideoSet, open_videos
from larp.data.loader import FixedPass, iterate_once
from larp.engine.signals import run_script
from larp.files import write_json
from larp.metrics import lpips
from larp.metrics.frechet import Moments, bootstrap_deviation, frechet_distance, real_floor
from larp.metrics.i3d import ClipFeatures, open_features
from larp.metrics.protocols import PRESETS, Protocol, check_record_path, result, summary
from larp.metrics.reconstruction import ValidationMetrics, reconstruct
from larp.models.tokenizer import LarpTokenizer

import torch
from torch import Tensor
from tqdm import tqdm

_FPS = 25.0


@dataclass(frozen=True)
class RfvdConfig:
    """Measure how well a LARP tokenizer reconstructs the clips of a data set."""

    tokenizer: str = ""
    """Folder or hub name of the tokenizer (needed)."""
    variant: Literal["ema"] | None = None
    """ema: the averaged weights of the tokenizer's training."""
    data: str = ""
    """Videos, as in training: ucf101:ROOT, a manifest, a folder, ... (needed)."""
    split: Literal["train", "test", "all"] = "test"
    """Which of them; the published rFVD is of the train split."""
    num_clips: int | None = None
    """Videos to measure, one clip of each, sampled by the seed; by default all of them."""
    out: Path = Path("results.json")
    """Where the figures go; the MP4 and the PNG get the same name with their own suffixes."""
    seed: int = 42
    """Of the choice of videos and of the start of each clip."""
    batch_size: int = 8
    """Clips at a time."""
    features: Literal["auto", "fvd-i3d-styleganv", "frechet-random-i3d"] = "auto"
    """Of the Frechet distance; auto: the published I3D where its file is at hand, else random weights."""
    i3d: Path | None = None
    """Path of i3d_torchscript.pt; by default LARP_I3D or the cache folder."""
    show: int = 8
    """Clips in the MP4 and the PNG; 0 writes neither."""
    repeats: int = 20
    """Bootstrap repeats behind the spread of the Frechet distance."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the models run."""

    def __post_init__(self):
        for name in ("batch_size", "num_clips"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.repeats < 2 or self.show < 0:
            raise ValueError(f"repeats must be at least 2 and show at least 0, got {self.repeats} and {self.show}")


def choose_videos(config: RfvdConfig) -> tuple[VideoSet, VideoSet, int]:
    """The videos to measure, further ones for the real-vs-real floor (perhaps none), and how many the split holds."""
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
    """One clip of every video with a seeded start, in batches; nothing for an empty set."""
    return iterate_once(videos, shape, config.batch_size, start="random", seed=config.seed) if len(videos) else ()


def skipped_of(once: FixedPass | tuple[()]) -> list[tuple[str, str]]:
    """(name, reason) of the videos that a pass could not read."""
    return once.skipped if once else []


def protocol_of(config: RfvdConfig, features: ClipFeatures, shape: ClipShape, videos: int, clips: int) -> Protocol:
    """The rFVD protocol of LARP with everything that this run does differently."""
    return replace(
        PRESETS["larp-ucf101-rfvd"],
        dataset="UCF-101" if config.data.startswith("ucf101:") else config.data,
        split=config.split,
        num_videos=videos,
        num_clips=clips,
        frames=shape.frames,
        height=shape.height,
        width=shape.width,
        features=features.name,
        seed=config.seed,
    )


def evaluate(config: RfvdConfig) -> dict:
    """Measure a tokenizer as `config` says, write everything, and return the content of the JSON."""
    check_record_path(config.out)
    for name in ("tokenizer", "data"):
        if not getattr(config, name):
            raise ValueError(f"--{name} is needed (see --help)")
    tokenizer = LarpTokenizer.from_pretrained(config.tokenizer, device=config.device, variant=config.variant)
    features = open_features(config.features, config.i3d, config.device)
    perceptual = lpips.Lpips.load().to(config.device) if lpips.available() else None
    shape = ClipShape(*tokenizer.config.clip_shape)
    videos, others, in_split = choose_videos(config)
    watch, once, more = (
        ValidationMetrics(features, perceptual),
        one_pass(videos, config, shape),
        one_pass(others, config, shape),
    )
    done = reconstruct(tokenizer, once, keep=config.show, device=config.device, watch=watch)
    spare = [features(batch["clip"]) for batch in tqdm(more, desc="real clips", unit="batch", delay=2)]
    protocol = protocol_of(config, features, shape, in_split, len(done.codes))
    report = {
        # The Frechet distance stands under its own name, with its protocol.
        **{name: value for name, value in done.metrics.items() if not name.startswith("rfvd")},
        "psnr_above_mean_colour": done.metrics["psnr"] - done.metrics["mean_colour_psnr"],
        "tokens_per_clip": tokenizer.num_tokens,
        "frechet": frechet_record(protocol, watch, spare, config, {"tokenizer": tokenizer.weight_hash()}),
        "skipped": [{"name": name, "reason": reason} for part in (once, more) for name, reason in skipped_of(part)],
        "config": to_dict(config),
    }
    report["files"] = list(done.write(str(config.out.with_suffix("")), _FPS)) if config.show else []
    write_json(config.out, report)
    return report


def frechet_record(
    protocol: Protocol, watch: ValidationMetrics, spare: list[Tensor], config: RfvdConfig, checkpoints: dict[str, str]
) -> dict:
    """The Frechet figure of what was watched, with spare real features for its floor."""
    real, decoded = torch.cat(watch.real), torch.cat(watch.decoded)
    return result(
        protocol,
        frechet_distance(Moments.of(real), Moments.of(decoded)),
        bootstrap_deviation(real, decoded, config.repeats, config.seed, paired=True),
        real_floor(torch.cat([real, *spare]), len(real), config.seed),
        watch.features,
        checkpoints,
    )


def describe(report: dict) -> str:
    """The figures of a report as lines for a person."""
    lines = [f"PSNR {report['psnr']:.2f} dB ({report['psnr_above_mean_colour']:+.2f} dB against the mean colour's "
             f"{report['mean_colour_psnr']:.2f})"]  # fmt: skip
    lines.append(f"SSIM {report['ssim']:.4f}")
    lines.append(f"LPIPS {report['lpips']:.4f}" if "lpips" in report else "LPIPS: no weights. " + lpips.LPIPS.remedy)
    lines.append(f"codes used {report['codes_used']:.1%}, perplexity {report['perplexity']:.1f}")
    if "prior_top1" in report:
        lines.append(f"prior: top-1 {report['prior_top1']:.1%}, {report['prior_bits']:.2f} bits per token")
    lines.append(summary(report["frechet"]))
    lines += [f"skipped {entry['name']}: {entry['reason']}" for entry in report["skipped"]]
    return "\n".join([*lines, *report["files"]])


def main(argv: list[str] | None = None) -> dict:
    """Run the command line `argv` (by default the program's own) and return the record; ValueError for mistakes of the user."""
    recipes = Path(__file__).resolve().parent / "recipes"
    config, _ = parse(RfvdConfig, sys.argv[1:] if argv is None else argv, recipes, "ucf_rfvd.py")
    report = evaluate(config)
    print(describe(report))
    print(config.out)
    return report


if __name__ == "__main__":
    run_script("ucf_rfvd.py", main)
