"""Frame prediction against copying the last given frame, in one command, on Kinetics-600 or any other videos:

    python eval/k600_fvd.py --generator runs/fp/model --tokenizer runs/k600/model --data k600:ROOT --given 5
    python eval/k600_fvd.py --mllm tiny --data ucf101:ROOT

Measures PSNR, SSIM and LPIPS (if its weights are found) of every predicted frame, and the Frechet distance by LARP's protocol. The
tokenizer's reconstruction is the upper bound. A copied frame is sharper than a decoded one; if the upper bound lies below the copy,
compare with the copy through the tokenizer. A PNG beside the JSON shows originals above predictions.

Shapes: B clips, T frames of which G are given, P = T - G predicted ones, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from larp.config import to_dict
from larp.data.clips import ClipShape, clip_to_frames
from larp.data.datasets import VideoSet, open_videos
from larp.data.extraction import repeat_last
from larp.data.listing import NoSplitError
from larp.engine.generator_run import find_training
from larp.engine.signals import run_script
from larp.files import write_json
from larp.metrics import lpips
from larp.metrics.clipsets import RealClips, describe_row, floor_row, frechet_row
from larp.metrics.evaluation import GeneratorEvaluationConfig, last_lines, run_evaluation, write_sheet
from larp.metrics.frame_prediction import (
    CODED_COPY,
    COPY,
    PREDICTION,
    RECONSTRUCTION,
    WAYS,
    as_frames,
    baselines,
    paired_gain,
)
from larp.metrics.frechet import real_floor
from larp.metrics.i3d import ClipFeatures
from larp.metrics.intervals import sources_of
from larp.metrics.protocols import PRESETS, Protocol, result, summary
from larp.metrics.psnr_ssim import ssim
from larp.models.losses import psnr
from larp.models.tokenizer import LarpTokenizer
from larp.sampling.sample import generate
from larp_mllm.generation.sampling import VideoSampling
from larp_mllm.metrics.clip_source import MllmSource

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_PRESET = PRESETS["larp-k600-fp"]


@dataclass(frozen=True)
class PredictionConfig(GeneratorEvaluationConfig):
    """Measure how well a model continues given frames. Guidance of a generator needs one trained with --condition-dropout."""

    needed: ClassVar[tuple[str, ...]] = ("data",)

    generator: str = ""
    """Folder or hub name of a frame-prediction LARP generator."""
    tokenizer: str = ""
    """Folder or hub name of the tokenizer that it was trained with."""
    mllm: str = ""
    """In place of both: folder of a language model that was trained for continuation, or of its run, or a hub name."""
    split: Literal["auto", "train", "validation", "test", "all"] = "auto"
    """Which videos; auto: validation, the published choice, where the data have one, else test."""
    given: int = 5
    """First frames of each clip that the model is shown."""
    num_clips: int | None = None
    """Clips to predict, sampled by the seed from all windows that do not overlap; by default 50,000 as published, or all windows if these
    are fewer."""
    out: Path = Path("prediction.json")
    show: int = 6

    def __post_init__(self):
        super().__post_init__()
        if self.num_clips is not None:
            self.check_at_least(num_clips=4)


@dataclass(frozen=True)
class Predictor:
    """A model that continues given frames."""

    tokenizer: LarpTokenizer
    shape: ClipShape
    checkpoints: Mapping[str, str]
    sample: Callable[[Tensor, int], Tensor]
    """Codes (B, N) of given frames, and the number of the first of these clips -> codes (B, N) of the clips."""


def open_predictor(config: PredictionConfig) -> Predictor:
    """Load a generator with its tokenizer, or a language model; ValueError if it does not continue `config.given` frames."""
    config.check_paths()
    if config.mllm:
        if config.generator or config.tokenizer or config.variant:
            raise ValueError(
                "--mllm: a language model has its own video tokenizer; leave out --generator, --tokenizer and --variant"
            )
        source = MllmSource.load(config.mllm, config.device)
        source.check_guidance(config)
        if source.mllm.given_frames() != config.given:
            raise ValueError(f"--given {config.given}: this model continues {source.mllm.given_frames()} frames")
        sampling = VideoSampling.of(config, seed=config.seed, batch_size=config.batch_size)
        continue_codes = source.mllm.continue_codes
        return Predictor(
            source.tokenizer,
            source.shape,
            source.checkpoints,
            lambda given, first: continue_codes(given, sampling, first),
        )
    if not (config.generator and config.tokenizer):
        raise ValueError("--generator and --tokenizer, or --mllm: give the model to measure")
    generator, tokenizer = config.open_models("frame-prediction")

    def sample(given: Tensor, first: int) -> Tensor:
        return generate(generator, generator.frame_condition(given), config, seed=config.seed, first_row=first)

    hashes = {"generator": generator.weight_hash(), "tokenizer": tokenizer.weight_hash()}
    shape = ClipShape(*tokenizer.config.clip_shape, stride=find_training(config.generator).stride or 1)
    return Predictor(tokenizer, shape, hashes, sample)


@dataclass
class Measured:
    """The measurements of the clips so far."""

    figures: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)
    """By metric and by one of WAYS: batches (b, P), one value for each predicted frame."""
    seam: list[Tensor] = field(default_factory=list)
    """Batches (b,): PSNR of the given frames as decoded from the predicted codes."""
    features: dict[str, list[Tensor]] = field(default_factory=dict)
    """Batches (b, D) by kind of clip; every distance is to those of "real"."""
    shown: list[np.ndarray] = field(default_factory=list)
    """uint8 (T, 2 H, W, 3): an original above its prediction."""


def scored_size(clip: Tensor) -> Tensor:
    """Clips (B, 3, T, H, W) at the protocol's 64x64 pixels (bilinear, antialiased)."""
    if clip.shape[-2:] == (_PRESET.height, _PRESET.width):
        return clip
    images = clip.transpose(1, 2).flatten(0, 1)
    size = (_PRESET.height, _PRESET.width)
    images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
    return images.unflatten(0, (len(clip), -1)).transpose(1, 2).clamp(0, 1)


@torch.inference_mode()
def measure(
    predictor: Predictor,
    clips: Iterator[Tensor],
    features: ClipFeatures,
    perceptual: lpips.Lpips | None,
    config: PredictionConfig,
) -> Measured:
    """Predict clips (b, 3, T, H, W), batch after batch, and measure them against the real ones and the baselines."""
    seen, first, given, tokenizer = Measured(), 0, config.given, predictor.tokenizer
    measures = {"psnr": psnr, "ssim": ssim} | ({"lpips": perceptual} if perceptual else {})
    for clip in clips:
        clip = clip.to(config.device)
        codes = tokenizer.encode(repeat_last(clip, given))
        decoded = tokenizer.decode(predictor.sample(codes, first).to(config.device))
        ways = {
            PREDICTION: torch.cat([clip[:, :, :given], decoded[:, :, given:]], dim=2),
            **baselines(tokenizer, clip, given, codes, tokenizer.encode(clip)),
        }
        for way, made in ways.items():
            for name, compare in measures.items():
                values = compare(as_frames(clip, given), as_frames(made, given)).view(len(clip), -1)
                seen.figures.setdefault(name, {}).setdefault(way, []).append(values.double().cpu())
        seen.seam.append(psnr(clip[:, :, :given], decoded[:, :, :given]).double().cpu())
        # The protocol scores all frames as they were decoded, the given ones too.
        sides = {"real": clip, "decoded": decoded, **ways}
        for name, side in sides.items():
            seen.features.setdefault(name, []).append(features(scored_size(side)))
        pairs = torch.cat([clip, ways[PREDICTION]], dim=3)
        seen.shown += [clip_to_frames(pair) for pair in pairs[: max(0, config.show - len(seen.shown))]]
        first += len(clip)
    return seen


def likeness(seen: Measured, sources: Tensor, config: PredictionConfig) -> dict[str, Any]:
    """Return the metrics of predicted frames: means over clips for each frame, and means over clips and frames.

    sources: the source of each clip, int64 (n,), see `larp.metrics.intervals`.

    The median of PSNR over clips is included because a frame that is copied exactly counts as 100 dB.
    """
    values = {name: {way: torch.cat(parts) for way, parts in ways.items()} for name, ways in seen.figures.items()}
    frames = values["psnr"][PREDICTION].shape[1]
    return {
        "frame": list(range(config.given + 1, config.given + 1 + frames)),
        "per_frame": {name: {w: v.mean(dim=0).tolist() for w, v in ways.items()} for name, ways in values.items()},
        "mean": {name: {w: v.mean().item() for w, v in ways.items()} for name, ways in values.items()},
        "median_psnr": {w: v.mean(dim=1).median().item() for w, v in values["psnr"].items()},
        "psnr_above": {
            way: paired_gain((values["psnr"][PREDICTION] - values["psnr"][way]).mean(dim=1), sources)
            for way in (COPY, CODED_COPY)
        },
        "given_frames_regenerated_psnr": torch.cat(seen.seam).mean().item(),
    }


def open_split(config: PredictionConfig) -> tuple[VideoSet, str]:
    """Return the videos to predict and the name of their split."""
    if config.split != "auto":
        return open_videos(config.data, config.split), config.split
    try:
        return open_videos(config.data, "validation"), "validation"
    except NoSplitError:
        return open_videos(config.data, "test"), "test"


def evaluate(config: PredictionConfig) -> dict:
    """Measure a model, write the JSON and the PNG, and return the content of the JSON."""
    predictor = open_predictor(config)
    shape = predictor.shape
    if not 1 <= config.given < shape.frames:
        raise ValueError(
            f"--given {config.given}: clips have {shape.frames} frames; give 1 to {shape.frames - 1} of them"
        )
    features, perceptual = config.open_features(), config.open_lpips()
    videos, split = open_split(config)
    clips = RealClips(videos, shape, config.num_clips, config.seed, config.batch_size, most=_PRESET.num_clips)
    rule = _PRESET.frame_rule.replace("5 frames", f"{config.given} frames", 1)
    protocol = config.protocol(_PRESET, features, shape, split=split, num_clips=clips.num_clips, frame_rule=rule)
    caption = f"above: original; below: {config.given} given frames, then predicted ones"
    seen = measure(predictor, clips.sampled(), features, perceptual, config)
    others = [features(scored_size(clip)) for clip in clips.others()]
    names = [f"{item.name} ({caption})" for item in clips.sampled_items]
    report = likeness(seen, sources_of(clips.sampled_items), config) | {
        "given": config.given,
        "num_clips": clips.num_clips,
        "frechet": frechet_record(seen, others, features, protocol, predictor.checkpoints, config),
        "skipped": clips.skipped,
        "config": to_dict(config),
        "files": write_sheet(seen.shown, names, config.out, columns=shape.frames, cell=160),
    }
    write_json(config.out, report)
    return report


def frechet_record(
    seen: Measured,
    others: list[Tensor],
    features: ClipFeatures,
    protocol: Protocol,
    checkpoints: Mapping[str, str],
    config: PredictionConfig,
) -> dict[str, Any]:
    """Return the record of the Frechet distance by the protocol, with a table of other distances from the same real clips."""
    sides = {name: torch.cat(parts) for name, parts in seen.features.items()}
    real = sides.pop("real")
    floor = real_floor(torch.cat([real, *others]), len(real), config.seed)
    names = {PREDICTION: "prediction, given frames pasted", "decoded": "prediction, all frames decoded"}
    rows = {
        name: frechet_row(names.get(name, name), real, side, config.repeats, config.seed, paired=True)
        for name, side in sides.items()
    }
    table = [floor_row(floor), *(rows[name] for name in (RECONSTRUCTION, "decoded", PREDICTION, COPY, CODED_COPY))]
    figure = rows["decoded"]
    return result(protocol, figure["value"], figure["deviation"], floor, features, checkpoints, table=table)


def describe(report: dict) -> str:
    """Return the figures of a report as text to print."""
    lines = ["frame  PSNR of: " + " | ".join(WAYS)]
    for number, frame in enumerate(report["frame"]):
        values = [report["per_frame"]["psnr"][way][number] for way in WAYS]
        lines.append(f"{frame:>5}  " + "  ".join(f"{value:6.2f}" for value in values))
    for name, means in report["mean"].items():
        lines.append(f"mean {name.upper()}: " + ", ".join(f"{way} {means[way]:.4g}" for way in WAYS))
    if "lpips" not in report["mean"]:
        lines.append("LPIPS: no weights. " + lpips.LPIPS.remedy)
    for way, gain in report["psnr_above"].items():
        low, high = gain["interval_95"] or (math.nan, math.nan)
        lines.append(
            f"prediction above {way}: {gain['mean']:+.2f} dB [{low:+.2f}, {high:+.2f}], better for"
            f" {gain['share_of_clips']:.1%} of {report['num_clips']} clips"
        )
    lines.append(f"the given frames as regenerated: {report['given_frames_regenerated_psnr']:.2f} dB")
    lines.append(summary(report["frechet"]))
    lines += [describe_row(row) for row in report["frechet"]["table"]]
    return "\n".join([*lines, *last_lines(report)])


main = partial(run_evaluation, __file__, PredictionConfig, evaluate, describe)

if __name__ == "__main__":
    run_script("k600_fvd.py", main)
