"""Class-conditional generation quality of an AR generator, in one command:

    python eval/ucf_gfvd.py --generator runs/ar/model --tokenizer runs/ucf/model --data ucf101:ROOT

Samples real clips by LARP's protocol and generates one clip for the label of each. Prints and writes the Frechet distance between
the two sets, with its protocol and the distance between two sets of real clips. A table compares the same real clips with their
reconstructions and with clips of further guidance scales. A PNG beside the JSON shows generated clips.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from larp.config import to_dict
from larp.data.clips import ClipShape, clip_to_frames
from larp.data.datasets import open_videos
from larp.engine.signals import run_script
from larp.files import write_json
from larp.metrics.classifier import require_labels
from larp.metrics.clipsets import (
    RealClips,
    class_numbers,
    describe_row,
    floor_row,
    frechet_row,
    generated_clips,
    reconstructed_clips,
)
from larp.metrics.evaluation import GeneratorEvaluationConfig, last_lines, run_evaluation, write_sheet
from larp.metrics.frechet import real_floor
from larp.metrics.i3d import ClipFeatures
from larp.metrics.protocols import PRESETS, result, summary
from larp.models.generator import LarpGenerator
from larp.models.quantizer import usage
from larp.models.tokenizer import LarpTokenizer
from larp.sampling.guidance import guidance_scales
from larp.sampling.options import GuidedSampling, check_guidance_scale

import numpy as np
import torch
from torch import Tensor

_PRESET = PRESETS["larp-ucf101-gfvd"]


@dataclass(frozen=True)
class GfvdConfig(GeneratorEvaluationConfig):
    """Measure the Frechet distance between clips of a class-conditional LARP generator and real clips."""

    data: str = ""
    """Labelled videos, as in training: ucf101:ROOT or a manifest with labels (needed)."""
    split: Literal["train", "test", "all"] = "train"
    """Which of them; the published gFVD is of the train split."""
    num_clips: int = _PRESET.num_clips
    """Clips on each side."""
    guidance_scale: float = 1.25
    also_guidance: tuple[float, ...] = ()
    """Further guidance scales for the table, constant over the guided codes. 1.0 shows the effect of guidance."""
    out: Path = Path("gfvd.json")

    def __post_init__(self):
        super().__post_init__()
        self.check_at_least(num_clips=2)
        for scale in self.also_guidance:
            check_guidance_scale("also_guidance", scale)

    @property
    def samplings(self) -> list[GuidedSampling]:
        """The sampling options of each row of the table; the figure is that of the last."""
        others = [GuidedSampling.of(self, guidance_scale=scale, guidance_final=None) for scale in self.also_guidance]
        return [*others, GuidedSampling.of(self)]


def evaluate(config: GfvdConfig) -> dict:
    """Measure a generator, write the JSON and the PNG, and return the content of the JSON."""
    generator, tokenizer = config.open_models("class")
    guidance_scales(config, tokenizer.num_tokens)
    features, shape = config.open_features(), ClipShape(*tokenizer.config.clip_shape)
    videos = open_videos(config.data, config.split)
    require_labels(videos)
    clips = RealClips(videos, shape, config.num_clips, config.seed, config.batch_size)
    # Unknown classes raise an error here, before the clips are read.
    class_numbers(generator, videos, [item.label for item in clips.sampled_items])
    pairs = reconstructed_clips(tokenizer, clips.sampled())
    both = [(features(clip), features(again)) for clip, again in pairs]
    real, decoded = (torch.cat(side) for side in zip(*both, strict=True))
    others = [features(clip) for clip in clips.others()]
    floor = real_floor(torch.cat([real, *others]), config.num_clips, config.seed)
    labels = [item.label for item in clips.sampled_items]
    classes = class_numbers(generator, videos, labels)
    table = [
        floor_row(floor),
        frechet_row("reconstructions", real, decoded, config.repeats, config.seed, paired=True),
    ]
    for sampling in config.samplings:
        made, codes, shown = generate_features(generator, tokenizer, classes, sampling, features, config)
        table.append(frechet_row(f"generated, {named(sampling)}", real, made, config.repeats, config.seed))
    report = result(
        config.protocol(
            _PRESET, features, shape, split=config.split, num_videos=len(videos), num_clips=config.num_clips,
            height=shape.height, width=shape.width,
        ),
        table[-1]["value"],
        table[-1]["deviation"],
        floor,
        features,
        {"generator": generator.weight_hash(), "tokenizer": tokenizer.weight_hash()},
        **usage(codes, tokenizer.codebook_size),
        tokens_per_clip=tokenizer.num_tokens,
        table=table,
        skipped=clips.skipped,
        config=to_dict(config),
        files=write_sheet(shown, [videos.classes[label] for label in labels], config.out),
    )  # fmt: skip
    write_json(config.out, report)
    return report


def named(sampling: GuidedSampling) -> str:
    """Return a short description of the guidance."""
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
    """Generate a clip for each class number; return features (n, D), codes (n, N), and the first `config.show` clips as frames."""
    made, codes, shown = [], [], []
    for clips, batch_codes in generated_clips(generator, tokenizer, classes, sampling, config.seed, config.batch_size):
        made.append(features(clips))
        codes.append(batch_codes)
        shown += [clip_to_frames(clip) for clip in clips[: max(0, config.show - len(shown))]]
    return torch.cat(made), torch.cat(codes), shown


def describe(report: dict) -> str:
    """Return the figures of a report as text to print."""
    lines = [summary(report), *map(describe_row, report["table"])]
    lines.append(f"codes used {report['codes_used']:.1%}, perplexity {report['perplexity']:.1f}")
    return "\n".join([*lines, *last_lines(report)])


main = partial(run_evaluation, __file__, GfvdConfig, evaluate, describe)

if __name__ == "__main__":
    run_script("ucf_gfvd.py", main)
