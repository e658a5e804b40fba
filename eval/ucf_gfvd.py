"""Class-conditional generation quality of an AR generator, in one command:

    python eval/ucf_gfvd.py --generator runs/ar/model --tokenizer runs/ucf/model --data ucf101:ROOT

Samples real clips as LARP's protocol does, generates one clip for the label of each, and prints and writes the Frechet
distance between the two sets with its protocol and its real-vs-real floor, and a table of what else was measured against
the same real clips: their reconstructions, and further guidance scales. Beside the JSON, a PNG of generated clips.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from larp.config import parse, to_dict
from larp.data.clips import ClipShape, clip_to_frames
from larp.data.contact_sheet import contact_sheet
from larp.data.datasets import open_videos
from larp.engine.signals import run_script
from larp.files import write_json
from larp.hub import check_device
from larp.metrics.classifier import require_labels
from larp.metrics.clipsets import (
    RealClips,
    class_numbers,
    countable,
    describe_row,
    floor_row,
    frechet_row,
    generated_clips,
    load_pair,
    reconstructed_clips,
)
from larp.metrics.frechet import real_floor
from larp.metrics.i3d import ClipFeatures, open_features
from larp.metrics.protocols import (
    PRESETS,
    Protocol,
    check_record_path,
    result,
    summary,
)
from larp.models.generator import LarpGenerator
from larp.models.quantizer import usage
from larp.models.tokenizer import LarpTokenizer
from larp.sampling.options import GuidedSampling
from larp.sampling.sample import guidance_scales

import numpy as np
import torch
from torch import Tensor

_PRESET = PRESETS["larp-ucf101-gfvd"]


@dataclass(frozen=True)
class GfvdConfig(GuidedSampling):
    """Measure how close the clips of a class-conditional LARP generator come to real ones."""

    generator: str = ""
    """Folder or hub name of the generator (needed)."""
    tokenizer: str = ""
    """Folder or hub name of the tokenizer whose codes it writes (needed)."""
    variant: Literal["ema"] | None = None
    """ema: the averaged weights of the tokenizer's training."""
    data: str = ""
    """Labelled videos, as in training: ucf101:ROOT or a manifest with labels (needed)."""
    split: Literal["train", "test", "all"] = "train"
    """Which of them; the published gFVD is of the train split."""
    num_clips: int = _PRESET.num_clips
    """Clips on each side."""
    guidance_scale: float = 1.25
    also_guidance: tuple[float, ...] = ()
    """Further scales to generate with, for the table, the same for all guided codes: 1.0 shows what guidance brings."""
    out: Path = Path("gfvd.json")
    """Where the figure goes; the PNG gets the same name with its own suffix."""
    seed: int = _PRESET.seed
    """Of the sampling of real clips and of the sampling."""
    batch_size: int = 16
    """Clips at a time."""
    features: Literal["auto", "fvd-i3d-styleganv", "frechet-random-i3d"] = "auto"
    """Of the Frechet distance; auto: the published I3D where its file is at hand, else random weights."""
    i3d: Path | None = None
    """Path of i3d_torchscript.pt; by default LARP_I3D or the cache folder."""
    show: int = 8
    """Generated clips in the PNG; 0 writes none."""
    repeats: int = 20
    """Bootstrap repeats behind the spread of the Frechet distance."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the models run."""

    def __post_init__(self):
        check_device(self.device)
        for scale in (self.guidance_scale, *self.also_guidance):
            GuidedSampling.of(self, guidance_scale=scale)
        if self.batch_size < 1 or self.num_clips < 2:
            raise ValueError(f"batch_size={self.batch_size} and num_clips={self.num_clips} must be at least 1 and 2")
        if self.repeats < 2 or self.show < 0:
            raise ValueError(f"repeats must be at least 2 and show at least 0, got {self.repeats} and {self.show}")

    @property
    def samplings(self) -> list[GuidedSampling]:
        """How to sample, one after the other; the figure is of the last."""
        others = [GuidedSampling.of(self, guidance_scale=scale, guidance_final=None) for scale in self.also_guidance]
        return [*others, GuidedSampling.of(self)]


def protocol_of(config: GfvdConfig, features: ClipFeatures, shape: ClipShape, num_videos: int) -> Protocol:
    """The gFVD protocol of LARP with everything that this run does differently."""
    return replace(
        _PRESET,
        dataset="UCF-101" if config.data.startswith("ucf101:") else config.data,
        split=config.split,
        num_videos=num_videos,
        num_clips=config.num_clips,
        frames=shape.frames,
        height=shape.height,
        width=shape.width,
        features=features.name,
        seed=config.seed,
    )


def evaluate(config: GfvdConfig) -> dict:
    """Measure a generator as `config` says, write everything, and return the content of the JSON."""
    check_record_path(config.out)
    for name in ("generator", "tokenizer", "data"):
        if not getattr(config, name):
            raise ValueError(f"--{name} is needed (see --help)")
    generator, tokenizer = load_pair(config.generator, config.tokenizer, "class", config.device, config.variant)
    guidance_scales(config, tokenizer.num_tokens)
    features = open_features(config.features, config.i3d, config.device)
    shape = ClipShape(*tokenizer.config.clip_shape)
    videos = open_videos(config.data, config.split)
    require_labels(videos)
    items, counts, skipped = countable(videos)
    clips = RealClips(items, counts, shape, config.num_clips, config.seed, config.batch_size)
    # Classes that the generator does not know are an error now, not after the reading.
    class_numbers(generator, videos, [items[video].label for video, _ in clips.windows])
    pairs = reconstructed_clips(tokenizer, clips.sampled())
    both = [(features(clip), features(again)) for clip, again in pairs]
    real, decoded = (torch.cat(side) for side in zip(*both, strict=True))
    others = [features(clip) for clip in clips.others()]
    floor = real_floor(torch.cat([real, *others]), config.num_clips, config.seed)
    labels = [items[video].label for video, _ in clips.windows]
    classes = class_numbers(generator, videos, labels)
    table = [
        floor_row(floor),
        frechet_row("reconstructions", real, decoded, config.repeats, config.seed, paired=True),
    ]
    for sampling in config.samplings:
        made, codes, shown = generate_features(generator, tokenizer, classes, sampling, features, config)
        table.append(frechet_row(f"generated, {named(sampling)}", real, made, config.repeats, config.seed))
    report = result(
        protocol_of(config, features, shape, len(videos)),
        table[-1]["value"],
        table[-1]["deviation"],
        floor,
        features,
        {"generator": generator.weight_hash(), "tokenizer": tokenizer.weight_hash()},
        **usage(codes, tokenizer.codebook_size),
        tokens_per_clip=tokenizer.num_tokens,
        table=table,
        skipped=[{"name": name, "reason": reason} for name, reason in [*skipped, *clips.skipped]],
        config=to_dict(config),
    )
    report["files"] = show(shown, [videos.classes[label] for label in labels], config.out)
    write_json(config.out, report)
    return report


def named(sampling: GuidedSampling) -> str:
    """Describe the guidance in a few words."""
    scale, final = sampling.guidance_scale, sampling.guidance_final
    start, stop = sampling.guidance_start, sampling.guidance_stop
    ramp = "" if final in (None, scale) else f" to {final:g}"
    part = "" if (start, stop) == (0, 1) else f" from {start:.0%} to {stop:.0%}"
    return f"guidance {scale:g}{ramp}{part}"


def generate_features(
    generator: LarpGenerator,
    tokenizer: LarpTokenizer,
    classes: Tensor,
    sampling: GuidedSampling,
    features: ClipFeatures,
    config: GfvdConfig,
) -> tuple[Tensor, Tensor, list[np.ndarray]]:
    """Generate a clip for each class number: features (n, D), codes (n, N), and the first clips as frames to show."""
    made, codes, shown = [], [], []
    for clips, written in generated_clips(generator, tokenizer, classes, sampling, config.seed, config.batch_size):
        made.append(features(clips))
        codes.append(written)
        shown += [clip_to_frames(clip) for clip in clips[: max(0, config.show - len(shown))]]
    return torch.cat(made), torch.cat(codes), shown


def show(generated: Sequence[np.ndarray], captions: Sequence[str], out: Path) -> list[str]:
    """Write the PNG of generated clips beside `out`; returns its path in a list, empty if there are none to show."""
    if not generated:
        return []
    contact_sheet(generated, captions[: len(generated)], out.with_suffix(".png"))
    return [str(out.with_suffix(".png"))]


def main(argv: list[str] | None = None) -> dict:
    """Run the command line `argv` (by default the program's own) and return the record; ValueError for mistakes of the user."""
    recipes = Path(__file__).resolve().parent / "recipes"
    config, _ = parse(GfvdConfig, sys.argv[1:] if argv is None else argv, recipes, "ucf_gfvd.py")
    report = evaluate(config)
    print(summary(report))
    print(*map(describe_row, report["table"]), sep="\n")
    print(f"codes used {report['codes_used']:.1%}, perplexity {report['perplexity']:.1f}")
    for entry in report["skipped"]:
        print(f"skipped {entry['name']}: {entry['reason']}")
    print(*report["files"], config.out, sep="\n")
    return report


if __name__ == "__main__":
    run_script("ucf_gfvd.py", main)
