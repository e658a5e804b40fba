"""A judge of what a clip shows: logistic regression on layout, colours and motion, trained on real clips in half a minute.

It says how often a generated clip is taken for its class. It looks at nothing finer than that on purpose: with histograms
of gradients it knew 87 real clips of a hundred rather than 81, but of those that had come through a small tokenizer 30 rather
than 75, because it mistook lost detail for a class. For the same reason it learns from softened copies as well.

Shapes: B clips, T frames, H x W pixels, F features, K classes, n clips in all.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from larp.data.clips import ClipShape
from larp.data.datasets import VideoSet, open_videos
from larp.data.extraction import read_windows
from larp.data.loader import iterate_once
from larp.data.shapes import cache_folder
from larp.data.token_cache import file_state
from larp.data.video import VideoError
from larp.metrics.clipsets import skipped_entries
from larp.models.tokenizer import LarpTokenizer

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

VERSION = 1
"""Raised whenever a change of this file gives another classifier for the same clips."""
WINDOWS = 2
"""Clips of a training video at most."""
_GRID = 4  # a picture in so many rows and columns
_LEVELS = 4  # of each colour channel in the histogram
_SOFTENED = (
    (1, 1),
    (1, 2),
    (2, 4),
    (4, 8),
)  # copies of a training clip: averaged over so many frames, and pixels a side
_PENALTY = 1e-3  # on the squared weights of standardised features; 1e-2 knew reconstructions less often
_STEPS = 100


@dataclass(frozen=True)
class ClipClassifier:
    """Names the class of a clip."""

    classes: tuple[str, ...]
    """Their names, K."""
    weight: Tensor
    """(K, F) float32."""
    bias: Tensor
    """(K,) float32."""
    key: dict[str, Any] = field(default_factory=dict)
    """What it was trained on."""

    def predict(self, clip: Tensor) -> Tensor:
        """Name clips (B, 3, T, H, W) in [0, 1]: class numbers int64 (B,) on the CPU."""
        return F.linear(describe(clip), self.weight, self.bias).argmax(dim=1)

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        notes = {"classes": json.dumps(self.classes), "key": json.dumps(self.key)}
        save_file({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}, part, metadata=notes)
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> ClipClassifier:
        """Read what `save` wrote; ValueError that names the file if it holds anything else."""
        try:
            with safe_open(str(path), framework="pt") as stored:
                notes = {name: json.loads(text) for name, text in stored.metadata().items() if name != "format"}
                tensors = {name: stored.get_tensor(name) for name in ("weight", "bias")}
            return cls(tuple(notes["classes"]), key=notes["key"], **tensors)
        except (SafetensorError, OSError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not a saved classifier ({error}); delete it, and it is trained again") from error


@torch.no_grad()
def describe(clip: Tensor) -> Tensor:
    """What the classifier sees of clips (B, 3, T, H, W) in [0, 1]: features (B, 144) float32 on the CPU.

    The mean of lightness and two colour differences on a grid of 4 x 4, roots of the histogram of 64 colours, and roots of the mean
    change of lightness on that grid, from frame to frame and over a quarter of the clip. ValueError for other shapes and for
    clips of fewer than 2 frames or 8 pixels a side.
    """
    if clip.ndim != 5 or clip.shape[1] != 3 or clip.shape[2] < 2 or min(clip.shape[-2:]) < 8:
        raise ValueError(
            f"classifier: needs clips (B, 3, T, H, W) of at least 2 frames and 8x8 pixels, got {tuple(clip.shape)}"
        )
    red, green, blue = clip.float().cpu().unbind(1)
    light = 0.299 * red + 0.587 * green + 0.114 * blue
    opponents = torch.stack([light, red - green, (red + green) / 2 - blue], dim=1)
    layout = F.adaptive_avg_pool2d(opponents.mean(dim=2), _GRID).flatten(1)
    levels = [(channel * _LEVELS).long().clamp(0, _LEVELS - 1) for channel in (red, green, blue)]
    colours = ((levels[0] * _LEVELS + levels[1]) * _LEVELS + levels[2]).flatten(1)
    counts = torch.zeros(len(clip), _LEVELS**3).scatter_add_(1, colours, torch.ones(colours.shape))
    motion = [_change(light, lag) for lag in (1, max(1, clip.shape[2] // 4))]
    return torch.cat([layout, (counts / colours.shape[1]).sqrt(), *motion], dim=1)


def _change(light: Tensor, lag: int) -> Tensor:
    moved = (light[:, lag:] - light[:, :-lag]).abs().mean(dim=1)
    return F.adaptive_avg_pool2d(moved, _GRID).flatten(1).sqrt()


def soften(clip: Tensor, frames: int, pixels: int) -> Tensor:
    """Take detail from clips (B, 3, T, H, W): means over boxes of frames x pixels x pixels, joined smoothly; same shape."""
    if frames == pixels == 1:
        return clip
    time, height, width = clip.shape[2:]
    coarse = (max(1, time // frames), max(1, height // pixels), max(1, width // pixels))
    return F.interpolate(F.adaptive_avg_pool3d(clip, coarse), size=(time, height, width), mode="trilinear")


def train(batches: Iterable[tuple[Tensor, Tensor]], classes: Sequence[str], key: dict | None = None) -> ClipClassifier:
    """Train on real clips: batches of (B, 3, T, H, W) in [0, 1] and their class numbers int64 (B,).

    Each clip counts as it is, softened, and mirrored. The loss is convex and minimised from zero, so there is nothing to seed:
    the same clips give the same classifier. ValueError for fewer than two classes, and for one without a clip.
    """
    rows, labels = [], []
    for clips, numbers in batches:
        for frames, pixels in _SOFTENED:
            copy = soften(clips, frames, pixels)
            rows += [describe(copy), describe(copy.flip(-1))]
            labels += [numbers, numbers]
    if len(classes) < 2:
        raise ValueError(f"a classifier needs at least 2 classes, the data has {len(classes)}: {', '.join(classes)}")
    seen = {number for part in labels for number in part.tolist()}
    if missing := [name for number, name in enumerate(classes) if number not in seen]:
        raise ValueError(f"no training clip of {', '.join(missing[:5])} ({len(missing)} of {len(classes)} classes)")
    weight, bias = _fit(torch.cat(rows).double(), torch.cat(labels), len(classes))
    return ClipClassifier(tuple(classes), weight.float(), bias.float(), key or {})


def _fit(rows: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Logistic regression of labels (n,) on rows (n, F) float64: weights (K, F) and biases (K,)."""
    mean, deviation = rows.mean(dim=0), rows.std(dim=0).clamp(min=1e-6)
    scaled = F.pad((rows - mean) / deviation, (0, 1), value=1.0)
    weight = torch.zeros(num_classes, scaled.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(scaled @ weight.T, labels) + _PENALTY * weight[:, :-1].square().sum()
        value.backward()
        return value

    solver.step(loss)
    plain = weight.detach()[:, :-1] / deviation
    return plain, weight.detach()[:, -1] - plain @ mean


def classifier_of(data: str, shape: ClipShape) -> ClipClassifier:
    """The classifier of the train split of a data spec for clips of a shape: trained once, then read from the cache folder.

    The cache ($LARP_DATA, else ~/.cache/larp) knows it by the spec, the videos with their labels, sizes and dates, and the
    shape. Videos that cannot be read or are too short are left out. ValueError for videos without a label, and as `train`.
    """
    videos = open_videos(data, "train")
    require_labels(videos)
    described = [[item.name, item.label, *file_state(item.path)] for item in videos.items]
    key = {
        "data": data,
        "videos": hashlib.sha256(json.dumps([described, videos.classes]).encode()).hexdigest()[:16],
        "shape": [shape.frames, shape.height, shape.width, shape.stride],
        "windows": WINDOWS,
        "version": VERSION,
    }
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = cache_folder() / "classifiers" / f"{digest}.safetensors"
    if path.is_file():
        return ClipClassifier.load(path)
    trained = train(_windows(videos, shape), videos.classes, key)
    trained.save(path)
    return trained


def require_labels(videos: VideoSet) -> None:
    """ValueError unless every video of a set has a class."""
    if lacking := [item.name for item in videos.items if item.label is None]:
        raise ValueError(
            f"{videos.spec}: {len(lacking)} of {len(videos)} videos have no class, such as {lacking[0]}; classes can be told"
            " with ucf101:ROOT, k600:ROOT, shapes:, or a manifest with a label for every video"
        )


def _windows(videos: VideoSet, shape: ClipShape) -> Iterable[tuple[Tensor, Tensor]]:
    for item in tqdm(videos.items, desc="training the classifier", unit="video", delay=2):
        try:
            clips = [window.clip for window in read_windows(item, shape, WINDOWS)]
        except VideoError:
            continue
        yield torch.stack(clips), torch.full((len(clips),), item.label)


def agreement(wanted: Sequence[int] | Tensor, taken_for: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """How often clips are taken for their class: wanted and taken_for are class numbers (n,); wherever the clips came from.

    Returns accuracy with Wilson's interval of 95 %, chance (1 / K), num_clips, by_class (name -> share) and confusion: for
    each wanted class, in the order of `classes`, how many clips were taken for each. ValueError if the lengths differ or
    there is no clip.
    """
    wanted = torch.as_tensor(wanted, dtype=torch.int64)
    if len(wanted) != len(taken_for) or not len(wanted):
        raise ValueError(f"{len(wanted)} wanted classes for {len(taken_for)} clips; need one for each, at least 1")
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    confusion.index_put_((wanted, taken_for), torch.ones_like(wanted), accumulate=True)
    right, sums = confusion.diagonal(), confusion.sum(dim=1)
    return {
        "accuracy": right.sum().item() / len(wanted),
        "interval_95": wilson(right.sum().item(), len(wanted)),
        "chance": 1 / len(classes),
        "num_clips": len(wanted),
        "by_class": {
            name: hit / count for name, hit, count in zip(classes, right.tolist(), sums.tolist(), strict=True) if count
        },
        "confusion": confusion.tolist(),
    }


@torch.inference_mode()
def classify_real(
    classifier: ClipClassifier, tokenizer: LarpTokenizer, videos: VideoSet, batch_size: int, stride: int = 1
) -> dict[str, Any]:
    """Agreement of the centre clips of real videos, as they are and through the tokenizer: what generated ones can reach.

    Args:
        videos: each with a label. A video that cannot be read is left out and named.
        batch_size: clips at a time, on the tokenizer's device.
        stride: every so many frames of a video.

    Returns {"real", "reconstructed": as `agreement`, "skipped": [{"name", "reason"}]}. ValueError if no video can be read.
    """
    once = iterate_once(videos, ClipShape(*tokenizer.config.clip_shape, stride), batch_size)
    device = tokenizer.codebook.device
    wanted, real, again = [], [], []
    for batch in tqdm(once, desc="judging real clips", unit="batch", delay=2):
        wanted.append(batch["label"])
        real.append(classifier.predict(batch["clip"]))
        again.append(classifier.predict(tokenizer.decode(tokenizer.encode(batch["clip"].to(device)))))
    skipped = skipped_entries(once.skipped)
    if not wanted:
        raise ValueError(f"{videos.spec}: none of its {len(videos)} videos can be read, such as {skipped[0]['name']}")
    labels = torch.cat(wanted)
    return {
        "real": agreement(labels, torch.cat(real), classifier.classes),
        "reconstructed": agreement(labels, torch.cat(again), classifier.classes),
        "skipped": skipped,
    }


def wilson(hits: int, count: int) -> list[float]:
    """The 95 % interval of a share of independent trials: [low, high] (Wilson 1927)."""
    z, share = 1.96, hits / count
    middle = share + z * z / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return [max(0.0, (middle - reach) / (1 + z * z / count)), min(1.0, (middle + reach) / (1 + z * z / count))]
