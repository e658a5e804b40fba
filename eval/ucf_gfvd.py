"""Class-conditional generation quality of an AR generator, in one command:

    python eval/ucf_gfvd.py --generator runs/ar/model --tokenizer runs/ucf/model --data ucf101:ROOT

Draws real clips as LARP's protocol does, generates one clip for the label of each, and prints and writes the Frechet
distance between the two sets with its protocol and its real-vs-real floor; beside the JSON, a PNG of generated clips.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from larp.config import parse, run_script, to_dict
from larp.data.clips import ClipShape, clip_to_frames, contact_sheet, frames_to_clip
from larp.data.datasets import VideoItem, VideoSet, open_videos
from larp.data.video import VideoError, count_frames, read_video
from larp.engine.log import write_json
from larp.generator import LarpGenerator
from larp.metrics.frechet import Moments, bootstrap_deviation, frechet_distance, real_floor
from larp.metrics.i3d import ClipFeatures, open_features
from larp.metrics.protocols import (
    PRESETS,
    Protocol,
    Window,
    check_record_path,
    draw_windows,
    headline,
    result,
)
from larp.quantizer import usage
from larp.sampling import check_sampling, generate
from larp.tokenizer import LarpTokenizer

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

_PRESET = PRESETS["larp-ucf101-gfvd"]


@dataclass(frozen=True)
class GfvdConfig:
    """Measure how close the clips of a class-conditional LARP generator come to real ones."""

    generator: str = ""
    """Folder or hub name of the generator (needed)."""
    tokenizer: str = ""
    """Folder or hub name of the tokenizer whose codes it writes (needed)."""
    data: str = ""
    """Labelled videos, as in training: ucf101:ROOT or a manifest with labels (needed)."""
    split: Literal["train", "test", "all"] = "train"
    """Which of them; the published gFVD is of the train split."""
    num_clips: int = _PRESET.num_clips
    """Clips on each side."""
    guidance_scale: float = 1.25
    """Classifier-free guidance; 1 is off."""
    temperature: float = 1.0
    """Of the sampling; 0 takes the likeliest code."""
    top_k: int = 0
    """Sample among the k likeliest codes; 0 keeps all."""
    top_p: float = 1.0
    """Sample among the likeliest codes that reach this probability; 1 keeps all."""
    out: Path = Path("gfvd.json")
    """Where the figure goes; the PNG gets the same name with its own suffix."""
    seed: int = _PRESET.seed
    """Of the drawing of real clips and of the sampling."""
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
        check_sampling(self.temperature, self.top_k, self.top_p, self.guidance_scale)
        if self.batch_size < 1 or self.num_clips < 2:
            raise ValueError(f"batch_size={self.batch_size} and num_clips={self.num_clips} must be at least 1 and 2")
        if self.repeats < 2 or self.show < 0:
            raise ValueError(f"repeats must be at least 2 and show at least 0, got {self.repeats} and {self.show}")


def countable(videos: VideoSet) -> tuple[list[VideoItem], list[int], list[tuple[str, str]]]:
    """The readable videos in sorted path order, their numbers of frames, and (name, reason) of the unreadable ones."""
    items, counts, skipped = [], [], []
    ordered = sorted(videos.items, key=lambda item: item.name)
    for item in tqdm(ordered, desc="counting frames", unit="video", delay=2):
        try:
            count = count_frames(item.path)
        except VideoError as error:
            skipped.append((item.name, str(error)))
            continue
        items.append(item)
        counts.append(count)
    return items, counts, skipped


def real_clips(items: Sequence[VideoItem], windows: Sequence[Window], shape: ClipShape, batch: int) -> Iterator[Tensor]:
    """The clips of `windows` in batches (b, 3, T, H, W); VideoError if a file is shorter than its header says."""
    clips = []
    for video, start in tqdm(windows, desc="real clips", unit="clip", delay=2):
        frames, _ = read_video(items[video].path, start, shape.frames)
        clips.append(frames_to_clip(frames, shape.height, shape.width))
        if len(clips) == batch:
            yield torch.stack(clips)
            clips = []
    if clips:
        yield torch.stack(clips)


def class_numbers(generator: LarpGenerator, videos: VideoSet, labels: Sequence[int]) -> Tensor:
    """The generator's class numbers (n,) for labels of the data set: by name where it stores names, else by position.

    ValueError for a generator without classes, a class that it does not know, or another number of classes.
    """
    if generator.config.class_names:
        return generator.class_labels([videos.classes[label] for label in labels])
    if generator.config.num_classes != len(videos.classes):
        raise ValueError(
            f"the generator has {generator.config.num_classes} classes without names, {videos.spec} has "
            f"{len(videos.classes)}: their numbers would not mean the same; use the data that it was trained on"
        )
    return generator.class_labels(list(labels))


@torch.inference_mode()
def generated_clips(
    generator: LarpGenerator, tokenizer: LarpTokenizer, classes: Tensor, config: GfvdConfig
) -> Iterator[tuple[Tensor, Tensor]]:
    """One clip for each class number: batches of clips (b, 3, T, H, W) in [0, 1] and their codes (b, N)."""
    with tqdm(total=len(classes), desc="generating", unit="clip", delay=2) as bar:
        for first in range(0, len(classes), config.batch_size):
            condition = classes[first : first + config.batch_size]
            codes = generate(
                generator,
                condition,
                guidance=config.guidance_scale,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                seed=config.seed,
                first_row=first,
            )
            yield tokenizer.decode(codes), codes.cpu()
            bar.update(len(condition))


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


def load_models(config: GfvdConfig) -> tuple[LarpGenerator, LarpTokenizer]:
    """Generator and tokenizer on the device; ValueError if an option is missing or the two do not belong together."""
    for name in ("generator", "tokenizer", "data"):
        if not getattr(config, name):
            raise ValueError(f"--{name} is needed (see --help)")
    tokenizer = LarpTokenizer.from_pretrained(config.tokenizer, device=config.device)
    generator = LarpGenerator.from_pretrained(config.generator, device=config.device)
    if generator.config.task != "class":
        raise ValueError(
            f"--generator {config.generator} predicts frames; gFVD needs one that is conditional on classes"
        )
    generator.check_tokenizer(tokenizer.num_tokens, tokenizer.codebook_size, tokenizer.weight_hash())
    return generator, tokenizer


def evaluate(config: GfvdConfig) -> dict:
    """Measure a generator as `config` says, write everything, and return the content of the JSON."""
    check_record_path(config.out)
    generator, tokenizer = load_models(config)
    features = open_features(config.features, config.i3d, config.device)
    shape = ClipShape(*tokenizer.config.clip_shape)
    videos = open_videos(config.data, config.split)
    if any(item.label is None for item in videos.items):
        raise ValueError(f"{config.data} has videos without a label; gFVD generates for the labels of the real clips")
    items, counts, skipped = countable(videos)
    drawn, spare = draw_windows(counts, shape.frames, config.num_clips, config.seed, spare=config.num_clips)
    classes = class_numbers(generator, videos, [items[video].label for video, _ in drawn])
    real = torch.cat([features(clip) for clip in real_clips(items, drawn + spare, shape, config.batch_size)])
    made, codes, shown = [], [], []
    for clips, written in generated_clips(generator, tokenizer, classes, config):
        made.append(features(clips))
        codes.append(written)
        shown += [clip_to_frames(clip) for clip in clips[: max(0, config.show - len(shown))]]
    generated = torch.cat(made)
    report = result(
        protocol_of(config, features, shape, len(videos)),
        frechet_distance(Moments.of(real[: len(drawn)]), Moments.of(generated)),
        bootstrap_deviation(real[: len(drawn)], generated, config.repeats, config.seed),
        real_floor(real, len(drawn), config.seed),
        features,
        {"generator": generator.weight_hash(), "tokenizer": tokenizer.weight_hash()},
        **usage(torch.cat(codes), tokenizer.codebook_size),
        tokens_per_clip=tokenizer.num_tokens,
        skipped=[{"name": name, "reason": reason} for name, reason in skipped],
        config=to_dict(config),
    )
    report["files"] = show(shown, [videos.classes[items[video].label] for video, _ in drawn], config.out)
    write_json(config.out, report)
    return report


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
    print(headline(report))
    print(f"codes used {report['codes_used']:.1%}, perplexity {report['perplexity']:.1f}")
    for entry in report["skipped"]:
        print(f"skipped {entry['name']}: {entry['reason']}")
    print(*report["files"], config.out, sep="\n")
    return report


if __name__ == "__main__":
    run_script("ucf_gfvd.py", main)
