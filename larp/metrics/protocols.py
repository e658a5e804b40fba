"""Named protocols of the Frechet figures, and the record that travels with every number.

A figure is comparable with published ones only if nothing of its protocol differs from a preset: what differs is listed
in the record, and the figure is named after its features, so that random ones are never called FVD.
"""

from __future__ import annotations

import platform
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from larp.files import check_writable
from larp.metrics.i3d import PUBLISHED_NAME, ClipFeatures

import torch


@dataclass(frozen=True)
class Protocol:
    """How a Frechet figure is measured; every field changes the figure. The presets are those of arXiv 2410.21264."""

    name: str
    """The preset that it is, or that it was made from by `dataclasses.replace`."""
    figure: Literal["gFVD", "rFVD", "frame-prediction FVD"]
    """What the figure is called when it is measured with the published I3D."""
    dataset: str
    """Which videos are the real ones."""
    split: Literal["train", "test", "all", "validation"]
    """Their split."""
    real_set: str
    """Which clips of them, and how they are sampled."""
    num_videos: int | None
    """Videos that the whole split holds; None where published counts differ."""
    num_clips: int
    """Clips on each side."""
    frames: int
    """Length of a clip at the native frame rate."""
    height: int
    """Pixels of the frames that are scored."""
    width: int
    """Pixels of the frames that are scored."""
    frame_rule: str
    """Which frames are scored, and how they are resized."""
    features: str
    """Name of the feature extractor."""
    seed: int
    """Of the sampling of real clips, and of sampling."""
    choices: tuple[str, ...] = ()
    """Where the published protocol leaves room or is not reproducible, and what we do."""

    @property
    def metric(self) -> str:
        """Name of the figure: FVD only with the published I3D, else the name of the features."""
        return self.figure if self.features == PUBLISHED_NAME else self.features

    @property
    def deviations(self) -> tuple[str, ...]:
        """Every field that differs from the preset of this name, as "field: here instead of there"."""
        preset = PRESETS[self.name]
        pairs = ((field.name, getattr(self, field.name), getattr(preset, field.name)) for field in fields(self))
        return tuple(
            f"{name}: {here} instead of {there}" for name, here, there in pairs if name != "choices" and here != there
        )


_SHARED_CHOICES = (
    "covariances divide by n; their square root is taken by an eigendecomposition in float64",
    "real frames are rounded to 8 bits after resizing (the reference keeps float); decoded frames are clamped, float",
)
_RESIZE = "short side resized (bilinear, antialiased), centre crop, native frame rate"

PRESETS: dict[str, Protocol] = {
    preset.name: preset
    for preset in (
        Protocol(
            name="larp-ucf101-gfvd",
            figure="gFVD",
            dataset="UCF-101",
            split="train",
            real_set="random.Random(seed).sample over all non-overlapping windows, videos in sorted path order",
            num_videos=9537,
            num_clips=10_000,
            frames=16,
            height=128,
            width=128,
            frame_rule=_RESIZE,
            features=PUBLISHED_NAME,
            seed=42,
            choices=(
                *_SHARED_CHOICES,
                "windows are counted by the frame numbers in the file headers",
                "generated clips use the labels of the real clips, in the order in which these are sampled",
            ),
        ),
        Protocol(
            name="larp-ucf101-rfvd",
            figure="rFVD",
            dataset="UCF-101",
            split="train",
            real_set="one clip for each video, reconstructed; a random start",
            num_videos=9537,
            num_clips=9537,
            frames=16,
            height=128,
            width=128,
            frame_rule=_RESIZE,
            features=PUBLISHED_NAME,
            seed=42,
            choices=(*_SHARED_CHOICES, "starts are sampled by the seed (the reference samples them unseeded)"),
        ),
        Protocol(
            name="larp-k600-fp",
            figure="frame-prediction FVD",
            dataset="Kinetics-600",
            split="validation",
            real_set="the clips that the predictions continue",
            num_videos=None,
            num_clips=50_000,
            frames=16,
            height=64,
            width=64,
            frame_rule="5 frames given; all 16 decoded frames scored, both sides resized (bilinear, antialiased)",
            features=PUBLISHED_NAME,
            seed=42,
            choices=_SHARED_CHOICES,
        ),
    )
}


Window = tuple[int, int]


def sample_windows(
    frame_counts: Sequence[int], frames: int, num_clips: int, seed: int, spare: int = 0
) -> tuple[list[Window], list[Window]]:
    """Draw clips from all non-overlapping windows of `frames` frames, as LARP's generation protocol does.

    frame_counts: frames of each video, in sorted path order; windows are listed video by video. Returns `num_clips`
    sampled by random.Random(seed).sample, and up to `spare` of the others (for the real-vs-real floor), each as (video,
    first frame).
    ValueError if there are fewer windows than clips: nothing is sampled twice.
    """
    windows = [(video, k * frames) for video, count in enumerate(frame_counts) for k in range(count // frames)]
    if num_clips < 1 or num_clips > len(windows):
        raise ValueError(
            f"num_clips={num_clips}, but {len(frame_counts)} videos hold {len(windows)} windows of {frames} frames "
            f"that do not overlap; ask for 1 to {len(windows)} clips or give more videos"
        )
    sampled = random.Random(seed).sample(windows, num_clips)
    taken = set(sampled)
    others = [window for window in windows if window not in taken]
    return sampled, random.Random(seed + 1).sample(others, min(spare, len(others)))


def result(
    protocol: Protocol,
    value: float,
    deviation: float,
    floor: tuple[float, int],
    features: ClipFeatures,
    checkpoints: Mapping[str, str],
    **extra: Any,
) -> dict[str, Any]:
    """The JSON-able record of one Frechet figure: the number and everything that it depends on.

    deviation: bootstrap standard deviation of `value`. floor: real-vs-real distance and the clips on each of its sides
    (see `larp.metrics.frechet.real_floor`). checkpoints: name -> hash. extra: further settings, such as the guidance
    scale. ValueError if the features are not those of the protocol.
    """
    if features.name != protocol.features:
        raise ValueError(f"measured with {features.name}, but the protocol says {protocol.features}")
    reasons = list(protocol.deviations)
    return {
        "metric": protocol.metric,
        "value": value,
        "deviation": deviation,
        "interval_95": [value - 1.96 * deviation, value + 1.96 * deviation],
        "num_clips": protocol.num_clips,
        "floor": {
            "value": floor[0],
            "num_clips": floor[1],
            # The floor falls as 1 / n, so that smaller samples can be carried over to the size of the figure.
            "at_num_clips": floor[0] * floor[1] / protocol.num_clips,
        },
        "comparable": not reasons,
        "reasons": reasons,
        "protocol": asdict(protocol),
        "features_weights": features.weights_hash,
        "checkpoints": dict(checkpoints),
        "seed": protocol.seed,
        "versions": versions(),
        **extra,
    }


def check_record_path(out: Path) -> None:
    """Raise ValueError unless a record can be written to `out` and pictures beside it, under its name; makes its folder.

    To be called before anything is computed, which may take hours.
    """
    if out.suffix.lower() in (".png", ".mp4"):
        raise ValueError(
            f"--out {out} is the name of a picture, which would overwrite the figures: give one that ends in .json"
        )
    try:
        check_writable(out)
    except ValueError as error:
        raise ValueError(f"--out {error}") from error
    out.parent.mkdir(parents=True, exist_ok=True)


def versions() -> dict[str, str]:
    """The versions that a figure depends on: larp, torch, python."""
    try:
        own = metadata.version("larp-mllm")
    except metadata.PackageNotFoundError:
        own = "source checkout"
    return {"larp": own, "torch": torch.__version__, "python": platform.python_version()}


def summary(record: Mapping[str, Any]) -> str:
    """The figure as a person should read it: name, value, spread, N, floor, and whether it may be compared."""
    floor = record["floor"]
    here = "" if floor["num_clips"] == record["num_clips"] else f", so about {floor['at_num_clips']:.2f} here"
    lines = [
        f"{record['metric']}: {record['value']:.2f} ± {1.96 * record['deviation']:.2f} (N={record['num_clips']}; "
        f"real against real {floor['value']:.2f} at N={floor['num_clips']}{here})"
    ]
    if record["comparable"]:
        lines.append(f"comparable with figures of the protocol {record['protocol']['name']}")
    else:
        lines.append(f"NOT comparable with {record['protocol']['name']}: " + "; ".join(record["reasons"]))
    return "\n".join(lines)
