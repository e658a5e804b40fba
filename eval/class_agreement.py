"""How often generated clips are classified as the class that they were generated for, in one command:

    python eval/class_agreement.py     # the newest generator trained here, else the one that comes with larp-mllm; LARP_UCF101=ROOT
    python eval/class_agreement.py --generator runs/ar/model --data ucf101:ROOT --guidance-scale 1 2
    python eval/class_agreement.py --mllm runs/ucf/mllm --data ucf101:ROOT --guidance-scale 1 2

A small classifier (larp.metrics.classifier) is trained on the real training clips and classifies generated clips. Where the data's
classes have names in Kinetics-400 and the weights of I3D are at hand, I3D classifies the same clips by its own classes
(larp.metrics.kinetics_classifier); it saw neither the data nor the models. Real test clips and their reconstructions are classified
as well: they are the upper bound. Writes accuracies with confusion tables, and a PNG of clips of the last guidance scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from larp.config import to_dict
from larp.data.clips import ClipShape, clip_to_frames
from larp.data.datasets import VideoSet
from larp.data.loader import iterate_once
from larp.engine.signals import run_script
from larp.files import write_json
from larp.metrics.classifier import (
    VERSION,
    Classifier,
    classifier_of,
    classify,
    classify_real,
    labelled_clips,
)
from larp.metrics.evaluation import last_lines, run_evaluation, write_sheet
from larp.metrics.kinetics_classifier import kinetics_classifier
from larp.metrics.protocols import versions
from larp.sampling.options import GuidedSampling, SamplingOptions, check_guidance_scale
from larp_mllm.metrics.clip_source import ClipSourceConfig

import numpy as np
import torch
from torch import Tensor

_LARGE = 128
"""Pixels per side of the real clips that are classified beside those of a smaller tokenizer's size: LARP's size of UCF-101."""


@dataclass(frozen=True)
class AgreementConfig(SamplingOptions, ClipSourceConfig):
    """Measure how often generated clips are classified as the class that they were generated for."""

    data: str = ""
    """Data spec of labelled videos, as in training. By default ucf101:$LARP_UCF101, else the data that the
    generator's run names. The classifier is trained on the train split and evaluated on the test split, on classes that the generator
    knows."""
    num_clips: int = 192
    """Clips to generate with each guidance scale, the classes in turn."""
    guidance_scale: tuple[float, ...] = (1.0, 1.25)
    """Scales of classifier-free guidance, each measured; 1 is off."""
    out: Path = Path("agreement.json")
    show: int = 12

    def __post_init__(self):
        ClipSourceConfig.__post_init__(self)
        SamplingOptions.__post_init__(self)
        self.check_at_least(num_clips=1)
        if not self.guidance_scale:
            raise ValueError("guidance_scale is empty; give at least one scale, where 1 is off")
        for scale in self.guidance_scale:
            check_guidance_scale("guidance_scale", scale)


def on_generated(
    classifiers: Sequence[Classifier], clips: Iterator[tuple[Tensor, Tensor]], labels: Sequence[int], show: int
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Classify generated clips; return their agreement with `labels`, and the first `show` clips as frames."""
    shown: list[np.ndarray] = []

    def labelled() -> Iterator[tuple[Tensor, Tensor]]:
        first = 0
        for batch, _ in clips:
            shown.extend(clip_to_frames(clip) for clip in batch[: max(0, show - len(shown))])
            yield batch, torch.tensor(labels[first : first + len(batch)])
            first += len(batch)

    return classify(classifiers, labelled()), shown


def on_large(classifiers: Sequence[Classifier], videos: VideoSet, shape: ClipShape, batch_size: int) -> dict[str, Any]:
    """Classify centred clips of real videos at 128x128; nothing where the tokenizer's clips are as large."""
    if min(shape.height, shape.width) >= _LARGE:
        return {}
    once = iterate_once(videos, ClipShape(shape.frames, _LARGE, _LARGE, shape.stride), batch_size)
    return {"real_128": classify(classifiers, labelled_clips(once, videos))}


def evaluate(config: AgreementConfig) -> dict:
    """Measure a model, write the JSON and the PNG, and return the content of the JSON."""
    config = config.resolved()
    source = config.open_source()
    tokenizer, shape = source.tokenizer, source.shape
    videos = config.open_videos(source, "test")
    labels = [number % len(videos.classes) for number in range(config.num_clips)]
    source.check(videos, labels)
    classifiers: list[Classifier] = [classifier_of(config.data, shape, videos.classes)]
    zero_shot = kinetics_classifier(videos.classes, shape.frames, config.device)
    missing = zero_shot if isinstance(zero_shot, str) else None
    if missing is None:
        classifiers.append(zero_shot)
    report = {"classes": list(videos.classes), "chance": 1 / len(videos.classes)}
    report |= on_large(classifiers, videos, shape, config.batch_size)
    report |= classify_real(classifiers, tokenizer, videos, config.batch_size, shape.stride) | {"generated": []}
    shown: list[np.ndarray] = []
    for scale in config.guidance_scale:
        sampling = GuidedSampling.of(config, guidance_scale=scale)
        clips = source.clips(videos, labels, sampling, config.seed, config.batch_size)
        figures, shown = on_generated(classifiers, clips, labels, config.show)
        report["generated"].append({"guidance_scale": scale} | figures)
    report |= {
        "checkpoints": source.checkpoints,
        "classifier": {"trained_on": classifiers[0].key, "version": VERSION},
        "zero_shot": {"missing": missing} if missing else zero_shot.notes,
        "versions": versions(),
        "config": to_dict(config),
        "files": write_sheet(shown, [videos.classes[label] for label in labels], config.out),
    }
    report |= source.notes(videos)
    write_json(config.out, report)
    return report


def describe(report: dict) -> str:
    """Return the figures of a report as text to print; the confusion tables are those of the last guidance scale."""
    rows = [("real test clips, 128x128", report["real_128"])] if "real_128" in report else []
    rows += [("real test clips", report["real"]), ("the same, reconstructed", report["reconstructed"])]
    rows += [(f"generated, guidance {figures['guidance_scale']:g}", figures) for figures in report["generated"]]
    notes = report["zero_shot"]
    lines = accuracies("classifier trained on real clips", rows, report["chance"])
    lines += confusion(rows[-1], report["classes"])
    if "missing" in notes:
        return "\n".join([*lines, f"no zero-shot classifier: {notes['missing']}", *last_lines(report)])
    title = f"zero-shot, {notes['features']} among {len(report['classes'])} classes"
    rows = [(name, figures["zero_shot"]) for name, figures in rows]
    centred = [(name, figures["centred"]) for name, figures in rows]
    for heading, part in ((title, rows), (f"{title}, minus each class's mean over the clips of a row", centred)):
        lines += accuracies(heading, part, report["chance"]) + confusion(part[-1], report["classes"])
    lines += [
        f"{name} is not the same class as Kinetics' {notes['kinetics'][name]}" for name in notes["not_the_same_class"]
    ]
    return "\n".join([*lines, *last_lines(report)])


def accuracies(title: str, rows: list[tuple[str, dict]], chance: float) -> list[str]:
    """Return the accuracies of one classifier as lines of text."""
    lines = [
        f"{name:<26} {figures['accuracy']:6.1%}  [{figures['interval_95'][0]:.1%}, {figures['interval_95'][1]:.1%}]"
        f"  N={figures['num_clips']}"
        for name, figures in rows
    ]
    return [title, *lines, f"{'chance':<26} {chance:6.1%}"]


def confusion(row: tuple[str, dict], classes: list[str]) -> list[str]:
    """Return a confusion table as lines of text."""
    width = max(map(len, classes))
    lines = [f"{row[0]}: class | classified as, in the same order"]
    return lines + [
        f"{name:>{width}} | " + " ".join(f"{count:4d}" for count in counts)
        for name, counts in zip(classes, row[1]["confusion"], strict=True)
    ]


main = partial(run_evaluation, __file__, AgreementConfig, evaluate, describe)

if __name__ == "__main__":
    run_script("class_agreement.py", main)
