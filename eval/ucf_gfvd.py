"""Class-conditional generation quality of an AR generator or a language model, in one command:

    python eval/ucf_gfvd.py     # the newest generator trained here, else the one that comes with larp-mllm; LARP_UCF101=ROOT
    python eval/ucf_gfvd.py --generator runs/ar/model --data ucf101:ROOT
    python eval/ucf_gfvd.py --mllm runs/ucf/mllm --data ucf101:ROOT --num-clips 1024

Samples real clips by LARP's protocol and generates one clip for the label of each. Prints and writes the Frechet distance between
the two sets, with its protocol and the distance between two sets of real clips. A table compares the same real clips with their
reconstructions and with clips of further guidance scales. A PNG beside the JSON shows generated clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from larp.config import to_dict
from larp.data.clips import clip_to_frames
from larp.data.datasets import VideoSet
from larp.engine.signals import run_script
from larp.files import write_json
from larp.metrics.clip_source import ClipSource
from larp.metrics.clipsets import RealClips, describe_row, floor_row, frechet_row, reconstructed_clips
from larp.metrics.evaluation import FrechetConfig, last_lines, run_evaluation, write_sheet
from larp.metrics.frechet import real_floor
from larp.metrics.i3d import ClipFeatures
from larp.metrics.protocols import PRESETS, result, summary
from larp.models.quantizer import usage
from larp.sampling.options import GuidedSampling, check_guidance_scale
from larp_mllm.metrics.clip_source import ClipSourceConfig

import numpy as np
import torch
from torch import Tensor

_PRESET = PRESETS["larp-ucf101-gfvd"]


@dataclass(frozen=True)
class GfvdConfig(ClipSourceConfig, GuidedSampling, FrechetConfig):
    """Measure the Frechet distance between clips that a model generates for classes and real clips."""

    needed: ClassVar[tuple[str, ...]] = ()

    data: str = ""
    """Data spec of labelled videos, as in training. By default ucf101:$LARP_UCF101, else the data that the
    generator's run names. Videos of classes that the generator does not know are left out."""
    split: Literal["train", "test", "all"] = "train"
    """Which of them; the published gFVD is of the train split."""
    num_clips: int | None = None
    """Clips on each side; by default 10,000 as published, or as many windows as the data hold if these are fewer."""
    guidance_scale: float = 1.25
    also_guidance: tuple[float, ...] = ()
    """Further guidance scales for the table, constant over the guided codes. 1.0 shows the effect of guidance."""
    out: Path = Path("gfvd.json")

    def __post_init__(self):
        FrechetConfig.__post_init__(self)
        GuidedSampling.__post_init__(self)
        if self.num_clips is not None:
            self.check_at_least(num_clips=2)
        for scale in self.also_guidance:
            check_guidance_scale("also_guidance", scale)

    @property
    def samplings(self) -> list[GuidedSampling]:
        """The sampling options of each row of the table; the figure is that of the last."""
        others = [GuidedSampling.of(self, guidance_scale=scale, guidance_final=None) for scale in self.also_guidance]
        return [*others, GuidedSampling.of(self)]


def evaluate(config: GfvdConfig) -> dict:
    """Measure a model, write the JSON and the PNG, and return the content of the JSON."""
    config = config.resolved()
    source = config.open_source()
    tokenizer, shape, features = source.tokenizer, source.shape, config.open_features()
    videos = config.open_videos(source, config.split)
    # Guidance of no code raises an error here, unknown classes below: before the clips are read.
    source.check(videos, [], *config.samplings)
    clips = RealClips(videos, shape, config.num_clips, config.seed, config.batch_size, most=_PRESET.num_clips)
    source.check(videos, [item.label for item in clips.sampled_items])
    pairs = reconstructed_clips(tokenizer, clips.sampled())
    both = [(features(clip), features(again)) for clip, again in pairs]
    real, decoded = (torch.cat(side) for side in zip(*both, strict=True))
    others = [features(clip) for clip in clips.others()]
    floor = real_floor(torch.cat([real, *others]), clips.num_clips, config.seed)
    labels = [item.label for item in clips.sampled_items]
    table = [
        floor_row(floor),
        frechet_row("reconstructions", real, decoded, config.repeats, config.seed, paired=True),
    ]
    for sampling in config.samplings:
        made, codes, shown = generate_features(source, videos, labels, sampling, features, config)
        table.append(frechet_row(f"generated, {named(sampling)}", real, made, config.repeats, config.seed))
    report = result(
        config.protocol(
            _PRESET, features, shape, split=config.split, num_videos=len(videos), num_clips=clips.num_clips,
            height=shape.height, width=shape.width,
        ),
        table[-1]["value"],
        table[-1]["deviation"],
        floor,
        features,
        source.checkpoints,
        **usage(codes, tokenizer.codebook_size),
        tokens_per_clip=tokenizer.num_tokens,
        table=table,
        skipped=clips.skipped,
        config=to_dict(config),
        **source.notes(videos),
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
    source: ClipSource,
    videos: VideoSet,
    labels: Sequence[int],
    sampling: GuidedSampling,
    features: ClipFeatures,
    config: GfvdConfig,
) -> tuple[Tensor, Tensor, list[np.ndarray]]:
    """Generate a clip for each label; return features (n, D), codes (n, N), and the first `config.show` clips as frames."""
    made, codes, shown = [], [], []
    for clips, batch_codes in source.clips(videos, labels, sampling, config.seed, config.batch_size):
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
