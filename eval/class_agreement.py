"""How often generated clips are classified as the class that they were generated for, in one command:

    python eval/class_agreement.py --generator runs/ar/model --tokenizer runs/ucf/model --data ucf101:ROOT --guidance-scale 1 2

A small classifier (larp.metrics.classifier) is trained on the real training clips and classifies generated clips. Real test clips
and their reconstructions are classified as well: they are the upper bound. Writes accuracies with confusion tables, and a PNG of
clips of the last guidance scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from larp.config import to_dict
from larp.data.clips import ClipShape, clip_to_frames
from larp.data.datasets import VideoSet, open_videos
from larp.engine.signals import run_script
from larp.files import write_json
from larp.metrics.classifier import VERSION, ClipClassifier, agreement, classifier_of, classify_real, require_labels
from larp.metrics.clipsets import class_numbers, generated_clips, load_pair
from larp.metrics.evaluation import EvaluationConfig, last_lines, run_evaluation, write_sheet
from larp.metrics.protocols import versions
from larp.models.generator import LarpGenerator
from larp.models.tokenizer import LarpTokenizer
from larp.sampling.options import GuidedSampling, SamplingOptions, check_guidance_scale

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class AgreementConfig(SamplingOptions, EvaluationConfig):
    """Measure how often clips of a class-conditional LARP generator are classified as their class."""

    needed: ClassVar[tuple[str, ...]] = ("generator", "tokenizer", "data")

    generator: str = ""
    """Folder or hub name of the generator (needed)."""
    tokenizer: str = ""
    """Folder or hub name of the tokenizer that the generator was trained with (needed)."""
    variant: Literal["ema"] | None = None
    """ema: the averaged weights of the tokenizer's training."""
    data: str = ""
    """Labelled videos, as in training: ucf101:ROOT or a manifest with labels (needed). The classifier is trained on the train split
    and evaluated on the test split."""
    num_clips: int = 192
    """Clips to generate with each guidance scale, the classes in turn."""
    guidance_scale: tuple[float, ...] = (1.0, 1.25)
    """Scales of classifier-free guidance, each measured; 1 is off."""
    out: Path = Path("agreement.json")
    show: int = 12

    def __post_init__(self):
        EvaluationConfig.__post_init__(self)
        SamplingOptions.__post_init__(self)
        self.check_at_least(num_clips=1)
        if not self.guidance_scale:
            raise ValueError("guidance_scale is empty; give at least one scale, where 1 is off")
        for scale in self.guidance_scale:
            check_guidance_scale("guidance_scale", scale)


def on_generated(
    classifier: ClipClassifier, clips: Iterator[tuple[Tensor, Tensor]], labels: Sequence[int], show: int
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Classify generated clips; return their agreement with `labels`, and the first `show` clips as frames."""
    predicted, shown = [], []
    for batch, _ in clips:
        predicted.append(classifier.predict(batch))
        shown += [clip_to_frames(clip) for clip in batch[: max(0, show - len(shown))]]
    return agreement(labels, torch.cat(predicted), classifier.classes), shown


def load(config: AgreementConfig) -> tuple[LarpGenerator, LarpTokenizer, VideoSet]:
    """Generator, tokenizer and labelled test videos; ValueError if an option is missing or they do not belong together."""
    config.check_paths()
    generator, tokenizer = load_pair(config.generator, config.tokenizer, "class", config.device, config.variant)
    videos = open_videos(config.data, "test")
    require_labels(videos)
    return generator, tokenizer, videos


def evaluate(config: AgreementConfig) -> dict:
    """Measure a generator, write the JSON and the PNG, and return the content of the JSON."""
    generator, tokenizer, videos = load(config)
    labels = [number % len(videos.classes) for number in range(config.num_clips)]
    condition = class_numbers(generator, videos, labels)
    classifier = classifier_of(config.data, ClipShape(*tokenizer.config.clip_shape))
    report = {"classes": list(classifier.classes), "chance": 1 / len(classifier.classes)}
    report |= classify_real(classifier, tokenizer, videos, config.batch_size) | {"generated": []}
    shown: list[np.ndarray] = []
    for scale in config.guidance_scale:
        sampling = GuidedSampling.of(config, guidance_scale=scale)
        clips = generated_clips(generator, tokenizer, condition, sampling, config.seed, config.batch_size)
        figures, shown = on_generated(classifier, clips, labels, config.show)
        report["generated"].append({"guidance_scale": scale} | figures)
    report |= {
        "checkpoints": {"generator": generator.weight_hash(), "tokenizer": tokenizer.weight_hash()},
        "classifier": {"trained_on": classifier.key, "version": VERSION},
        "versions": versions(),
        "config": to_dict(config),
        "files": write_sheet(shown, [videos.classes[label] for label in labels], config.out),
    }
    write_json(config.out, report)
    return report


def describe(report: dict) -> str:
    """Return the figures of a report as text to print; the confusion table is that of the last guidance scale."""
    rows = [("real test clips", report["real"]), ("the same, reconstructed", report["reconstructed"])]
    rows += [(f"generated, guidance {figures['guidance_scale']:g}", figures) for figures in report["generated"]]
    lines = [
        f"{name:<26} {figures['accuracy']:6.1%}  [{figures['interval_95'][0]:.1%}, {figures['interval_95'][1]:.1%}]"
        f"  N={figures['num_clips']}"
        for name, figures in rows
    ]
    lines.append(f"{'chance':<26} {report['chance']:6.1%}")
    width = max(map(len, report["classes"]))
    lines.append(f"{rows[-1][0]}: class | classified as, in the same order")
    for name, counts in zip(report["classes"], rows[-1][1]["confusion"], strict=True):
        lines.append(f"{name:>{width}} | " + " ".join(f"{count:4d}" for count in counts))
    return "\n".join([*lines, *last_lines(report)])


main = partial(run_evaluation, __file__, AgreementConfig, evaluate, describe)

if __name__ == "__main__":
    run_script("class_agreement.py", main)
