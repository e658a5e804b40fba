"""The two sets of clips of a generation metric, real and generated ones, and the table of their distances.

Shapes: b clips of a batch, T frames, H x W pixels, N codes of a clip, n clips in all, D feature width.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from larp.data.clips import ClipShape, frames_to_clip
from larp.data.datasets import VideoItem, VideoSet
from larp.data.video import VideoError, count_frames, read_clip
from larp.metrics.frechet import Moments, bootstrap_deviation, frechet_distance
from larp.metrics.protocols import Window, sample_windows
from larp.models.generator import LarpGenerator, Task
from larp.models.tokenizer import LarpTokenizer
from larp.sampling.options import GuidedSampling
from larp.sampling.sample import generate

import torch
from torch import Tensor
from tqdm import tqdm

_TASKS = {"class": "is conditional on classes", "frame-prediction": "predicts frames"}


def readable_videos(videos: VideoSet) -> tuple[list[VideoItem], list[int], list[tuple[str, str]]]:
    """Return the readable videos sorted by name, their numbers of frames, and (name, reason) of the unreadable ones."""
    items, counts, skipped = [], [], []
    ordered = sorted(videos.items, key=lambda item: item.name)
    for item in tqdm(ordered, desc="counting frames", unit="video", delay=2):
        try:
            count = count_frames(item.path)
        except VideoError as error:
            skipped.append((item.name, str(error).removeprefix(f"{item.path}: ")))
            continue
        items.append(item)
        counts.append(count)
    return items, counts, skipped


def skipped_entries(skipped: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Return (name, reason) of videos that cannot be read as entries of a record."""
    return [{"name": name, "reason": reason} for name, reason in skipped]


class RealClips:
    """Real clips sampled by LARP's protocol, and as many further clips for the real-vs-real floor.

    Clips of a video that turns out to be damaged are replaced by the first further clips, then by the remaining windows
    in an order given by the seed.

    Args:
        videos: the data set; clips are sampled from its readable videos.
        shape: of a clip; windows do not overlap.
        num_clips, seed: as in `larp.metrics.protocols.sample_windows`. None: `most`, or all windows if there are fewer.
        batch: clips per batch.
        most: the published number of clips.

    Raises ValueError if there are too few windows.
    """

    def __init__(
        self, videos: VideoSet, shape: ClipShape, num_clips: int | None, seed: int, batch: int, most: int | None = None
    ):
        self.items, counts, self._unreadable = readable_videos(videos)
        if num_clips is None:
            num_clips = min(most, sum(count // shape.span for count in counts))
        self.shape, self.num_clips, self.batch = shape, num_clips, batch
        self.windows, spare = sample_windows(counts, shape.span, num_clips, seed, spare=num_clips)
        everything = ((video, k * shape.span) for video, count in enumerate(counts) for k in range(count // shape.span))
        known = {*self.windows, *spare}
        rest = [window for window in everything if window not in known]
        random.Random(seed + 2).shuffle(rest)
        self._reserve = iter([*spare, *rest])
        self._damaged: dict[int, str] = {}

    @property
    def sampled_items(self) -> list[VideoItem]:
        """The video of each sampled clip."""
        return [self.items[video] for video, _ in self.windows]

    @property
    def skipped(self) -> list[dict[str, str]]:
        """The unreadable videos and the damaged ones found so far, as `skipped_entries`."""
        damaged = [(self.items[video].name, reason) for video, reason in self._damaged.items()]
        return skipped_entries([*self._unreadable, *damaged])

    def sampled(self) -> Iterator[Tensor]:
        """Yield the sampled clips in batches (b, 3, T, H, W); afterwards `windows` lists their (video, first frame).

        Raises ValueError if no window is left to replace one of a damaged video.
        """
        return self._batches(self._all_sampled())

    def others(self) -> Iterator[Tensor]:
        """Yield up to `num_clips` further clips in batches (b, 3, T, H, W); to be read once, after `sampled`."""
        return self._batches(clip for clip, _ in islice(self._in_reserve(), self.num_clips))

    def _all_sampled(self) -> Iterator[Tensor]:
        reserve = self._in_reserve()
        for place, window in enumerate(tqdm(self.windows, desc="real clips", unit="clip", delay=2)):
            clip = self._read(window)
            if clip is None:
                clip, self.windows[place] = next(reserve, (None, window))
            if clip is None:
                video, reason = list(self._damaged.items())[-1]
                raise ValueError(
                    f"{self.items[video].name} is damaged ({reason}), and no window of another video is left to replace it: "
                    f"repair or remove the damaged videos ({len(self._damaged)} so far), or ask for fewer than {self.num_clips} clips"
                )
            yield clip

    def _in_reserve(self) -> Iterator[tuple[Tensor, Window]]:
        for window in self._reserve:
            if (clip := self._read(window)) is not None:
                yield clip, window

    def _read(self, window: Window) -> Tensor | None:
        video, start = window
        if video in self._damaged:
            return None
        try:
            frames = read_clip(self.items[video].path, start, self.shape.frames, self.shape.stride)
        except VideoError as error:
            self._damaged[video] = str(error).removeprefix(f"{self.items[video].path}: ")
            return None
        return frames_to_clip(frames, self.shape.height, self.shape.width)

    def _batches(self, clips: Iterator[Tensor]) -> Iterator[Tensor]:
        while batch := list(islice(clips, self.batch)):
            yield torch.stack(batch)


def load_generator(generator: str, task: Task, device: str) -> LarpGenerator:
    """Load a generator on the device; CheckpointError for unreadable files, ValueError if it has another task."""
    model = LarpGenerator.from_pretrained(generator, device=device)
    if model.config.task != task:
        raise ValueError(f"--generator {generator} {_TASKS[model.config.task]}; this needs one that {_TASKS[task]}")
    return model


def load_pair(
    generator: str, tokenizer: str, task: Task, device: str, variant: str | None = None
) -> tuple[LarpGenerator, LarpTokenizer]:
    """Load a generator for `task` and its tokenizer, in weight variant `variant`, on the device.

    Raises CheckpointError for unreadable files, ValueError if the generator has another task or another tokenizer.
    """
    codec = LarpTokenizer.from_pretrained(tokenizer, device=device, variant=variant)
    model = load_generator(generator, task, device)
    model.check_tokenizer(codec.num_tokens, codec.codebook_size, codec.weight_hash())
    return model, codec


def class_numbers(generator: LarpGenerator, videos: VideoSet, labels: Sequence[int]) -> Tensor:
    """Return the generator's class indices (n,) for labels of a data set, matched by name if it stores names.

    Raises ValueError for a generator without classes, an unknown class, or another number of classes.
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
    generator: LarpGenerator,
    tokenizer: LarpTokenizer,
    condition: Tensor,
    sampling: GuidedSampling,
    seed: int,
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one clip for each row of a condition: batches of clips (b, 3, T, H, W) in [0, 1] and their codes (b, N).

    Args:
        generator, tokenizer: the tokenizer decodes the generator's codes.
        condition: class indices (n,), or given codes and separator (n, N + 1).
        batch_size: clips per pass; it does not affect the clips.
        sampling, seed: as in `larp.sampling.sample.generate`.
    """
    with tqdm(total=len(condition), desc="generating", unit="clip", delay=2) as bar:
        for first in range(0, len(condition), batch_size):
            rows = condition[first : first + batch_size]
            codes = generate(generator, rows, sampling, seed=seed, first_row=first)
            yield tokenizer.decode(codes), codes.cpu()
            bar.update(len(rows))


@torch.inference_mode()
def reconstructed_clips(tokenizer: LarpTokenizer, clips: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of clips (b, 3, T, H, W) in [0, 1], and their reconstructions on the tokenizer's device."""
    for clip in clips:
        yield clip, tokenizer.decode(tokenizer.encode(clip.to(tokenizer.codebook.device)))


def frechet_row(
    name: str, real: Tensor, other: Tensor, repeats: int, seed: int, paired: bool = False
) -> dict[str, Any]:
    """Return a row of the table of Frechet distances: from real features (n, D) to features `other` (n, D).

    repeats, seed, paired: as in `larp.metrics.frechet.bootstrap_deviation`.
    """
    return {
        "clips": name,
        "value": frechet_distance(Moments.of(real), Moments.of(other)),
        "deviation": bootstrap_deviation(real, other, repeats, seed, paired),
        "num_clips": len(other),
    }


def floor_row(floor: tuple[float, int]) -> dict[str, Any]:
    """Return the row of the real-vs-real distance, see `larp.metrics.frechet.real_floor`."""
    return {"clips": "other real clips (the floor)", "value": floor[0], "deviation": None, "num_clips": floor[1]}


def describe_row(row: dict[str, Any]) -> str:
    """Return a row of the table of Frechet distances as text."""
    interval = "" if row["deviation"] is None else f" ± {1.96 * row['deviation']:.2f}"
    return f"  {row['clips']:<34} {row['value']:.2f}{interval} (N={row['num_clips']})"
