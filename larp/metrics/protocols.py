"""Named protocols of Frechet figures, and the record with everything that a figure depends on.

A figure is comparable with published ones only if its protocol equals a preset. The record lists all differences, and
names the figure after its features, so that figures of random features are never called FVD.
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
from larp.metrics.i3d import FVD_NAMES, PUBLISHED_NAME, ClipFeatures
from larp.metrics.weights import file_sha256

import torch


@dataclass(frozen=True)
class Protocol:
    """Definition of a Frechet figure; every field affects its value. The presets are those of arXiv 2410.21264."""

    name: str
    """Name of the preset, also of one modified by `dataclasses.replace`."""
    figure: Literal["gFVD", "rFVD", "frame-prediction FVD"]
    """Name of the figure when it is measured with the published I3D."""
    dataset: str
    """Data set of the real videos."""
    split: Literal["train", "test", "all", "validation"]
    """Split of the real videos."""
    real_set: str
    """Which clips of the videos are used, and how they are sampled."""
    num_videos: int | None
    """Number of videos in the complete split; None where published counts differ."""
    num_clips: int
    """Number of clips in each of the two sets."""
    frames: int
    """Length of a clip at the native frame rate."""
    height: int
    """Height in pixels of the scored frames."""
    width: int
    """Width in pixels of the scored frames."""
    frame_rule: str
    """Which frames are scored, and how they are resized."""
    features: str
    """Name of the feature extractor."""
    seed: int
    """Seed for sampling real clips and generating."""
    choices: tuple[str, ...] = ()
    """Our choices where the published protocol is ambiguous or not reproducible."""

    @property
    def metric(self) -> str:
        """Name of the figure: FVD only with an I3D trained on Kinetics, else the name of the features."""
        return self.figure if self.features in FVD_NAMES else self.features

    @property
    def deviations(self) -> tuple[str, ...]:
        """The fields that differ from the preset of this name, as "field: value instead of preset value"."""
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
                "windows are counted by the packets of the files, without decoding",
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
    """Sample windows from all non-overlapping windows of `frames` frames, as in LARP's generation protocol.

    Args:
        frame_counts: number of frames of each video, in sorted path order.
        frames: length of a window.
        num_clips, seed: size of the sample, which is that of random.Random(seed).sample.
        spare: maximum number of further windows, for the real-vs-real floor.

    Returns the sample and the further windows, each window as (video, first frame). Raises ValueError if there are fewer
    windows than clips, since none is sampled twice.
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
    """Return the JSON-serialisable record of one Frechet figure: its value and everything that it depends on.

    Args:
        protocol: as it was measured.
        value, deviation: the distance and its bootstrap standard deviation.
        floor: real-vs-real distance and its number of clips, see `larp.metrics.frechet.real_floor`.
        features: the feature extractor.
        checkpoints: hashes by name.
        extra: further settings, such as the guidance scale.

    Raises ValueError if the features are not those of the protocol.
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
            # The floor is proportional to 1 / n, so that it can be extrapolated to the size of the figure.
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
    """Raise ValueError unless a record can be written to `out` and pictures beside it; create its folder.

    To be called before the computation, which may take hours.
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


def checkpoint_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every safetensors file below a model's folder, by relative path."""
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in sorted(folder.rglob("*.safetensors"))}


def versions(*packages: str) -> dict[str, str | None]:
    """Return the versions of larp, torch, python and further packages, None for those that are not installed."""
    own = {"larp": _version("larp-mllm") or "source checkout", "torch": torch.__version__}
    return own | {"python": platform.python_version()} | {name: _version(name) for name in packages}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def summary(record: Mapping[str, Any]) -> str:
    """Describe a record as text: name, value, 95 % interval, N, floor, and whether it is comparable."""
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
