"""Evaluate a language model that was trained on videos of named classes, in one command:

    python eval/ucf_mllm.py --model runs/ucf/mllm --data ucf101:ROOT --eval-tokens runs/ucf/tokens-test --out ucf-mllm.json

Four parts, which --what selects. bits: bits per held-out code after a caption and without one. agreement: how often a classifier
assigns a generated video to the class that it was generated for, with real and reconstructed clips for comparison. captions: how
often the caption of a real clip names its class. continuation: PSNR of predicted frames, compared with copying and reconstruction.

The record holds the results of all guidance scales and temperatures that are asked for; none is selected on the test clips.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from larp.config import to_dict
from larp.data.clips import clip_to_frames
from larp.data.contact_sheet import contact_sheet
from larp.data.datasets import VideoSet, humanize, open_videos
from larp.data.token_cache import TokenCache
from larp.engine.signals import run_script
from larp.files import write_json
from larp.metrics.classifier import VERSION, classifier_of, classify_real, require_labels
from larp.metrics.evaluation import EvaluationConfig, run_evaluation
from larp.metrics.frame_prediction import BASELINES, COPY
from larp.metrics.protocols import check_record_path, checkpoint_hashes, versions
from larp.sampling.options import SamplingOptions
from larp_mllm.generation.sampling import VideoSampling
from larp_mllm.locate import find_model
from larp_mllm.metrics.evaluation import (
    caption_accuracy,
    clip_shape,
    continuation_figures,
    generated_agreement,
    held_out_bits,
    prompts_of,
    split_evenly,
)
from larp_mllm.pipeline import Mllm

import numpy as np
from torch import Tensor

Part = Literal["bits", "agreement", "captions", "continuation"]


@dataclass(frozen=True)
class UcfMllmConfig(SamplingOptions, EvaluationConfig):
    """Measure a language model that was trained on videos of named classes."""

    model: Path | None = None
    """Folder of the model, or of the run that trained it; by default LARP_MLLM_MODEL, else the newest one trained here."""
    data: str = ""
    """Data spec of labelled videos, as in training (needed but for bits). The classifier is trained on
    the train split; everything is measured on the test split."""
    eval_tokens: Path | None = None
    """Token cache of held-out clips, from training/extract_tokens.py (needed for bits)."""
    train_tokens: Path | None = None
    """Token cache of the training clips: adds the bits per code of a model that knows only the frequency of each code."""
    what: tuple[Part, ...] = ("bits", "agreement", "captions", "continuation")
    """The parts to measure."""
    num_videos: int | None = None
    """Videos to generate with each guidance scale, equally many for each class; by default at least 192. The phrasings of a class take
    turns."""
    guidance_scale: tuple[float, ...] = (1.0, 2.0)
    """Scales of classifier-free guidance of the generated videos, each measured; 1 is off."""
    num_clips: int = 200
    """Test clips to continue, sampled by the seed from all windows that do not overlap."""
    continuation_temperature: tuple[float, ...] = (1.0, 0.0)
    """Temperatures of the predicted frames, each measured. They are sampled without text or guidance."""
    out: Path = Path("ucf-mllm.json")
    show: int = 8
    """Generated videos of each class, and continued clips, in the PNGs; 0 writes none."""

    def __post_init__(self):
        EvaluationConfig.__post_init__(self)
        SamplingOptions.__post_init__(self)
        self.check_at_least(num_clips=2)
        for name in ("what", "guidance_scale", "continuation_temperature"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one value")
        for scale in self.guidance_scale:
            VideoSampling.of(self, guidance_scale=scale)
        for temperature in self.continuation_temperature:
            self.continuation(temperature)

    def continuation(self, temperature: float) -> VideoSampling:
        """Return the sampling options of predicted frames."""
        return VideoSampling.of(self, guidance_scale=1.0, temperature=temperature)


class Job:
    """One evaluation: its options, the model, the test videos, and the paths of the pictures so far."""

    def __init__(self, config: UcfMllmConfig):
        """Check what the parts need, load the model, list the test videos; ValueError names what is missing."""
        if "bits" in config.what and config.eval_tokens is None:
            raise ValueError("bits needs --eval-tokens, a token cache of held-out clips; or leave bits out of --what")
        asked = [part for part in config.what if part != "bits"]
        if asked and not config.data:
            raise ValueError(f"{', '.join(asked)}: --data is needed, the labelled videos; or ask for --what bits alone")
        self.config, self.files = config, []
        self.videos: VideoSet | None = open_videos(config.data, "test") if asked else None
        if self.videos is not None:
            require_labels(self.videos)
        if "agreement" in config.what:
            classes = len(self.videos.classes)
            self.num_videos = -(-192 // classes) * classes if config.num_videos is None else config.num_videos
            split_evenly(self.num_videos, classes)
        self.folder = find_model(config.model)
        self.mllm = Mllm.load(self.folder, config.device)
        if "continuation" in config.what and not self.mllm.model.config.given_frames:
            raise ValueError(
                "the model was not trained to continue clips (given_frames is 0 in its config.json): leave continuation out "
                "of --what, or train with a token cache that was extracted with --condition-frames 5"
            )

    def bits(self) -> dict[str, Any]:
        """Bits per code of held-out clips, from token caches that the model's own tokenizer made."""
        caches = [
            folder and TokenCache.open(folder, {"tokenizer": self.mllm.model.config.video_tokenizer_hash})
            for folder in (self.config.eval_tokens, self.config.train_tokens)
        ]
        return held_out_bits(self.mllm, *caches, self.config.batch_size) | {"tokens": caches[0].key}

    def agreement(self) -> dict[str, Any]:
        """How often real, reconstructed and generated clips are classified as their class; writes a sheet for each scale."""
        config, shape, texts = self.config, clip_shape(self.mllm), prompts_of(self.videos)
        classifier = classifier_of(config.data, shape)
        tokenizer = self.mllm.processor.video_tokenizer
        report = classify_real([classifier], tokenizer, self.videos, config.batch_size, shape.stride)
        report |= {"classes": list(classifier.classes), "chance": 1 / len(texts), "generated": []}
        for scale in config.guidance_scale:
            sampling = VideoSampling.of(config, guidance_scale=scale)
            figures, made = generated_agreement(self.mllm, classifier, texts, self.num_videos, sampling)
            report["generated"].append({"guidance_scale": scale} | figures)
            if config.show:
                middles = [np.stack([v.frames[len(v.frames) // 2] for v in row[: config.show]]) for row in made]
                names = [f"{humanize(name)} (guidance {scale:g})" for name in self.videos.classes]
                self.sheet(f"guidance-{scale:g}", middles, names, columns=config.show)
        return report | {
            "prompts": dict(zip(self.videos.classes, map(list, texts), strict=True)),
            "classifier": {"trained_on": classifier.key, "version": VERSION},
        }

    def captions(self) -> dict[str, Any]:
        """How often a caption names the class of its video."""
        classes = list(self.videos.classes)
        return caption_accuracy(self.mllm, self.videos, self.config.batch_size) | {"classes": classes}

    def continuation(self) -> dict[str, Any]:
        """PSNR of predicted frames; writes a sheet of them."""
        config = self.config
        ways = {f"temperature {t:g}": config.continuation(t) for t in config.continuation_temperature}
        return continuation_figures(
            self.mllm, self.videos, config.num_clips, config.seed, ways, config.batch_size, self._show_continued
        )

    def _show_continued(self, way: str, names: list[str], pairs: Tensor) -> None:
        given, frames = self.mllm.model.config.given_frames, pairs.shape[2]
        note = f"above: original; below: {given} given frames, then predicted ones, {way}"
        if self.config.show:
            shown = [clip_to_frames(pair) for pair in pairs[: self.config.show]]
            captions = [f"{name} ({note})" for name in names[: len(shown)]]
            self.sheet(f"continuation-{way.replace(' ', '-')}", shown, captions, columns=frames, cell=160)

    def sheet(self, name: str, videos: list[np.ndarray], captions: list[str], **layout: int) -> None:
        """Write a contact sheet beside the record."""
        path = self.config.out.with_name(f"{self.config.out.stem}-{name}.png")
        contact_sheet(videos, captions, path, **layout)
        self.files.append(str(path))

    def protocol(self) -> dict[str, Any]:
        """Everything that changes a figure; the checkpoint by the SHA-256 of each of its files of weights."""
        model, shape = self.mllm.model, clip_shape(self.mllm)
        own = model.config
        return {
            "split": "test; the classifier learns from train",
            "clips": f"{shape.frames} frames of {shape.height}x{shape.width} at stride {shape.stride}, short side resized, centre crop",
            "bits": "teacher-forced, over code logits alone; all clips of the cache; intervals of 95 % with videos as clusters",
            "agreement": "larp.metrics.classifier; real: centre clips; generated: 8 bits, classes and phrasings in turn; Wilson's intervals",
            "captions": "centre clips, likeliest words; class read by larp_mllm.metrics.scores.class_in_caption; none read is wrong",
            "continuation": "windows that do not overlap, sampled by the seed; no text, no guidance; PSNR of predicted frames, mean over clips",
            "model": {
                "base": own.text_config.model_type,
                "adapter": own.adapter,
                "parameters": model.num_parameters(),
                "codes_per_clip": own.tokens_per_video,
                "codebook_size": own.codebook_size,
                "given_frames": own.given_frames,
            },
            "checkpoint": checkpoint_hashes(self.folder),
            "versions": versions("transformers", "numpy", "av"),
            "config": to_dict(self.config),
        }


def evaluate(config: UcfMllmConfig) -> dict:
    """Measure the selected parts and return the content of the JSON, which is written after every part."""
    check_record_path(config.out)
    job = Job(config)
    report: dict[str, Any] = {"protocol": job.protocol()}
    for part in dict.fromkeys(config.what):
        report[part] = getattr(job, part)()
        write_json(config.out, report | {"files": job.files})
    return report | {"files": job.files}


def interval(figure: dict, form: str) -> str:
    """The 95 % interval of a figure in brackets; nothing where there is none."""
    return f"[{', '.join(format(end, form) for end in figure['interval_95'])}]" if figure["interval_95"] else ""


def bits_lines(part: dict) -> list[str]:
    """Return the bits as lines of text."""
    rows = [("after the caption, first phrasing", "first_phrasing"), ("mean over its phrasings", "all_phrasings"),
            ("without text", "without_text"), ("the caption saves", "text_saves")]  # fmt: skip
    lines = [f"bits per code, {part['num_clips']} held-out clips of {part['num_videos']} videos"]
    lines += [f"  {words:<34} {part[key]['mean']:6.3f}  {interval(part[key], '.3f')}" for words, key in rows]
    if "frequencies" in part:
        lines.append(f"  {'by frequency in training':<34} {part['frequencies']['held_out']:6.3f}")
    return [*lines, f"  {'all codes alike':<34} {part['uniform']:6.3f}"]


def agreement_lines(part: dict) -> list[str]:
    """Return the agreement as lines of text; the confusion table is that of the last guidance scale."""
    rows = [("real test clips", part["real"]), ("the same, reconstructed", part["reconstructed"])]
    rows += [(f"generated, guidance {figures['guidance_scale']:g}", figures) for figures in part["generated"]]
    lines = ["classified as their class"]
    lines += [f"  {n:<34} {f['accuracy']:6.1%}  {interval(f, '.1%')}  N={f['num_clips']}" for n, f in rows]
    lines.append(f"  {'chance':<34} {part['chance']:6.1%}")
    return lines + table(f"{rows[-1][0]}: class | classified as", part["classes"], rows[-1][1]["confusion"])


def captions_lines(part: dict) -> list[str]:
    """Return the captions as lines of text."""
    accuracy = f"  {'captions that name the class':<34} {part['accuracy']:6.1%}  {interval(part, '.1%')}  N={part['num_clips']}"
    chance = f"chance {part['chance']:.1%}, always the most frequent class {part['most_frequent']:.1%}"
    head = f"{chance}; {part['unread']} captions name no class"
    return [
        accuracy,
        f"  {head}",
        *table("captions: class | named, last column none", part["classes"], part["confusion"]),
    ]


def table(title: str, classes: list[str], confusion: list[list[int]]) -> list[str]:
    """A confusion table as lines."""
    width = max(map(len, classes))
    rows = [f"    {name:>{width}} | " + " ".join(f"{count:4d}" for count in counts)
            for name, counts in zip(classes, confusion, strict=True)]  # fmt: skip
    return [f"  {title}, in the same order", *rows]


def continuation_lines(part: dict) -> list[str]:
    """Return the continuation as lines of text."""
    lines = [
        f"frames {part['frame'][0]} to {part['frame'][-1]} from {part['given']} given ones, {part['num_clips']} clips: PSNR"
    ]
    ways = [*part["above"], *BASELINES]
    for way in ways:
        name = f"prediction, {way}" if way in part["above"] else way
        gain = part["above"].get(way, {}).get(COPY)
        words = f"  {gain['mean']:+.2f} dB {interval(gain, '+.2f')} over copying" if gain else ""
        lines.append(f"  {name:<34} {part['mean'][way]:6.2f}{words}")
    bits = ", ".join(f"{name.replace('_', ' ')} {figure['mean']:.3f}" for name, figure in part["bits_after"].items())
    return [*lines, f"  bits per code after {bits}"]


LINES = {
    "bits": bits_lines,
    "agreement": agreement_lines,
    "captions": captions_lines,
    "continuation": continuation_lines,
}


def describe(report: dict) -> str:
    """Return the figures of a report as text to print."""
    lines = [line for part, lines_of in LINES.items() if part in report for line in lines_of(report[part])]
    protocol, skipped = report["protocol"], {}
    for part in LINES:
        skipped |= {entry["name"]: entry["reason"] for entry in report.get(part, {}).get("skipped", ())}
    lines.append(f"protocol: {protocol['split']}; {protocol['clips']}; seed {protocol['config']['seed']}")
    lines += [f"skipped {name}: {reason}" for name, reason in sorted(skipped.items())]
    return "\n".join([*lines, *report["files"]])


main = partial(run_evaluation, __file__, UcfMllmConfig, evaluate, describe)

if __name__ == "__main__":
    run_script("ucf_mllm.py", main)
