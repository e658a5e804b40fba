"""Does a model repeat its training clips? How near generated clips lie to the nearest training clip, in one command:

    python eval/memorising.py --generator runs/ar/model --data ucf101:ROOT --guidance-scale 1
    python eval/memorising.py --mllm runs/ucf/mllm --data ucf101:ROOT

Distances are those of larp.metrics.nearest. Generated clips come out of the tokenizer's decoder, whose blur moves features. The fair
comparison is therefore through the tokenizer on both sides: generated clips, and reconstructions of held-out clips, each to the
reconstructions of the training clips. A training clip that is repeated code by code has distance 0 there. A model that has learned
the classes and not the clips is about as near as held-out clips are: about 5 % of its clips are nearer than the nearest 5 % of those.

Two rows say what a distance means: training clips to the nearest clip of another training video, often a cut of the same source, and
to another clip of their own video, which is what a copy at other frames looks like. Held-out clips share no source with training
clips; a generated clip that is as near as the first of these rows repeats a scene, as the second a video.

Every generated and held-out clip counts with its mirror image, whichever is nearer, since models are trained on mirrored clips. The
second table has the distances to the training clips as they are, where blur keeps everything that is decoded away. A contact sheet
shows the generated clips that are nearest to a training clip, above that clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from larp.config import to_dict
from larp.data.clips import ClipShape, clip_to_frames
from larp.data.datasets import VideoSet
from larp.data.extraction import read_windows
from larp.engine.signals import run_script
from larp.files import write_json
from larp.metrics.clip_source import ClipSource
from larp.metrics.evaluation import last_lines, run_evaluation, write_sheet
from larp.metrics.i3d import ClipFeatures, open_features
from larp.metrics.nearest import (
    RealFeatures,
    distance_row,
    nearest,
    nearest_among_themselves,
    real_features,
    with_mirror_images,
)
from larp.metrics.protocols import versions
from larp.sampling.options import GuidedSampling, SamplingOptions, check_guidance_scale
from larp_mllm.metrics.clip_source import ClipSourceConfig

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class MemorisingConfig(SamplingOptions, ClipSourceConfig):
    """Measure how near generated clips lie to the nearest training clip."""

    data: str = ""
    """Data spec of labelled videos that the model was trained on. By default
    ucf101:$LARP_UCF101, else the data that the generator's run names. The train split is compared with; clips of the test split are held
    out."""
    num_clips: int = 192
    """Clips to generate with each guidance scale, for classes in the proportions of the held-out clips."""
    guidance_scale: tuple[float, ...] = (1.0, 1.25)
    """Scales of classifier-free guidance, each measured; 1 is off."""
    windows: int = 2
    """Largest number of clips of a training video. Each clip takes two passes of I3D, whose results are cached."""
    out: Path = Path("memorising.json")

    def __post_init__(self):
        ClipSourceConfig.__post_init__(self)
        SamplingOptions.__post_init__(self)
        self.check_at_least(num_clips=1, windows=1)
        if not self.guidance_scale:
            raise ValueError("guidance_scale is empty; give at least one scale, where 1 is off")
        for scale in self.guidance_scale:
            check_guidance_scale("guidance_scale", scale)


def generate_features(
    source: ClipSource,
    videos: VideoSet,
    labels: list[int],
    scale: float,
    features: ClipFeatures,
    config: MemorisingConfig,
) -> tuple[Tensor, list[np.ndarray]]:
    """Generate a clip for each label; return features (n, 2, D) of the clips and their mirror images, and the clips as frames."""
    made, frames = [], []
    sampling = GuidedSampling.of(config, guidance_scale=scale)
    for clips, _ in source.clips(videos, labels, sampling, config.seed, config.batch_size):
        made.append(with_mirror_images(features, clips))
        frames += map(clip_to_frames, clips)
    return torch.cat(made), frames


def rows(generated: dict[str, Tensor], held_out: dict[str, Tensor], training: Tensor) -> list[dict[str, Any]]:
    """Return the rows of generated and of held-out clips: their features (n, 2, D) by name, against training features (m, D).

    The share of each row that is nearer is that below the 5 % quantile of the last set of held-out clips.
    """
    found = {name: nearest(features, training)[0] for name, features in (generated | held_out).items()}
    threshold = found[list(held_out)[-1]].quantile(0.05).item()
    return [distance_row(name, values, threshold) for name, values in found.items()]


def through_the_tokenizer(
    generated: dict[str, Tensor], held_out: RealFeatures, training: RealFeatures
) -> list[dict[str, Any]]:
    """Return the rows of the distances between decoded clips: generated, held-out, and training clips among themselves."""
    found = rows(generated, {"held-out clips": held_out.decoded}, training.decoded)
    others, siblings = nearest_among_themselves(training.decoded, training.videos)
    controls = {"training clips, to another training video": others, "training clips, to its own video": siblings}
    threshold = found[-1]["quantile_05"]
    return found + [distance_row(name, values, threshold) for name, values in controls.items() if len(values)]


def as_they_are(generated: dict[str, Tensor], held_out: RealFeatures, training: RealFeatures) -> list[dict[str, Any]]:
    """Return the rows of the distances to the training clips as they are."""
    both = {"held-out clips": held_out.real, "held-out clips, reconstructed": held_out.decoded}
    return rows(generated, both, training.real)


def sheet(
    config: MemorisingConfig,
    shape: ClipShape,
    train: VideoSet,
    training: RealFeatures,
    made: Tensor,
    generated: list[tuple[str, np.ndarray]],
) -> tuple[list[np.ndarray], list[str]]:
    """Return pictures of the `show` generated clips that are nearest to a training clip, each above that clip, and captions.

    made: features (n, 2, D). generated: class and frames of each clip.
    """
    found, which = nearest(made, training.decoded)
    pictures, captions = [], []
    for place in found.argsort()[: config.show].tolist():
        row, (name, frames) = which[place], generated[place]
        item, window = train.items[training.videos[row]], int(training.windows[row])
        clip = read_windows(item, shape, config.windows)[window].clip
        pictures.append(np.concatenate([frames, clip_to_frames(clip)], axis=1))
        captions.append(f"{name}, distance {found[place]:.3f}; below: {item.name}, clip {window + 1}")
    return pictures, captions


def evaluate(config: MemorisingConfig) -> dict:
    """Measure a model, write the JSON and the PNG, and return the content of the JSON."""
    config = config.resolved()
    source = config.open_source()
    train, test = (config.open_videos(source, split) for split in ("train", "test"))
    source.check(train, [item.label for item in test.items])
    features = open_features("auto", None, config.device)
    if source.shape.frames < features.min_frames:
        raise ValueError(
            f"{features.name} needs clips of {features.min_frames} frames, the model's have {source.shape.frames}; "
            "measure a model of longer clips"
        )
    given = features, source.tokenizer, config.batch_size
    training = real_features(train, source.shape, config.windows, *given)
    held_out = real_features(test, source.shape, 1, *given, mirror=True)
    # The classes of the held-out clips: how near clips lie depends on the class.
    known = [test.items[number].label for number in held_out.videos]
    labels = [known[place * len(known) // config.num_clips] for place in range(config.num_clips)]
    generated: dict[str, Tensor] = {}
    for scale in config.guidance_scale:
        made, frames = generate_features(source, train, labels, scale, features, config)
        generated[f"generated, guidance {scale:g}"] = made
    shown = [(train.classes[label], clip) for label, clip in zip(labels, frames, strict=True)]
    pictures, captions = sheet(config, source.shape, train, training, made, shown)
    report = {
        "through_the_tokenizer": through_the_tokenizer(generated, held_out, training),
        "as_they_are": as_they_are(generated, held_out, training),
        "training_clips": len(training.videos),
        "training_videos": len(training.videos.unique()),
        "features": {"name": features.name, "weights": features.weights_hash},
        "distance": "1 - cosine of features minus the mean of the training clips'; the nearer of clip and mirror image",
        "checkpoints": source.checkpoints,
        "versions": versions(),
        "skipped": [*training.skipped, *held_out.skipped],
        "config": to_dict(config),
        "files": write_sheet(pictures, captions, config.out, cell=160),
    }
    report |= source.notes(train)
    write_json(config.out, report)
    return report


def describe(report: dict) -> str:
    """Return the figures of a report as text to print."""
    clips, videos = report["training_clips"], report["training_videos"]
    lines = [f"distance ({report['features']['name']}) to the nearest of {clips} clips of {videos} training videos"]
    titles = {
        "through_the_tokenizer": "to reconstructions of the training clips; held-out clips reconstructed as well",
        "as_they_are": "to the training clips as they are",
    }
    for table, title in titles.items():
        lines += [title, f"  {'':<41} median    5 %    1 %  least  nearer than 5 % of held-out reconstructions"]
        for row in report[table]:
            values = " ".join(f"{row[name]:6.3f}" for name in ("median", "quantile_05", "quantile_01", "least"))
            low, high = row["nearer_interval_95"]
            lines.append(
                f"  {row['clips']:<41} {values} {row['nearer']:6.1%}  [{low:.1%}, {high:.1%}]  N={row['num_clips']}"
            )
    return "\n".join([*lines, *last_lines(report)])


main = partial(run_evaluation, __file__, MemorisingConfig, evaluate, describe)

if __name__ == "__main__":
    run_script("memorising.py", main)
