"""What the scripts of eval/ share: common options and their checks, loading of models and features, and printing.

A script adds its own options, a function `evaluate` (config -> record), and a function `describe` (record -> text).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from larp.config import check_count, parse
from larp.data.clips import ClipShape
from larp.data.contact_sheet import contact_sheet
from larp.data.datasets import split_specs
from larp.hub import check_device
from larp.kernels.allocator import keep_freed_memory
from larp.metrics import lpips
from larp.metrics.clipsets import load_pair
from larp.metrics.i3d import ClipFeatures, open_features
from larp.metrics.protocols import Protocol, check_record_path
from larp.models.generator import LarpGenerator, Task
from larp.models.tokenizer import LarpTokenizer
from larp.sampling.options import GuidedSampling

import numpy as np
import torch

Config = TypeVar("Config")

_DATASETS = {"ucf101": "UCF-101", "k600": "Kinetics-600"}


@dataclass(frozen=True)
class RecordConfig:
    """The options of everything that writes a record; ValueError for values out of range."""

    needed: ClassVar[tuple[str, ...]] = ()

    out: Path = Path("results.json")
    """Where the figures go; pictures get the same name with their own suffixes."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the models run."""

    def __post_init__(self):
        check_device(self.device)

    def check_at_least(self, **least: int) -> None:
        """Raise ValueError, naming the option, if one is below its least value."""
        for name, bound in least.items():
            check_count(name, getattr(self, name), bound)

    def check_paths(self) -> None:
        """Raise ValueError if a needed option is missing or `out` cannot be written."""
        check_record_path(self.out)
        for name in self.needed:
            if not getattr(self, name):
                raise ValueError(f"--{name} is needed (see --help)")


@dataclass(frozen=True)
class EvaluationConfig(RecordConfig):
    """The options of evaluations on videos; ValueError for values out of range."""

    needed: ClassVar[tuple[str, ...]] = ("data",)

    data: str = ""
    """Data spec of the videos, as in training (needed)."""
    seed: int = 42
    """Of the choice of clips, and of the sampling of codes."""
    batch_size: int = 16
    """Clips at a time."""
    show: int = 8
    """Clips in the pictures; 0 writes none."""

    def __post_init__(self):
        super().__post_init__()
        self.check_at_least(batch_size=1, show=0)


@dataclass(frozen=True)
class FrechetConfig(EvaluationConfig):
    """The options of evaluations that measure the Frechet distance of decoded clips; ValueError for values out of range."""

    needed: ClassVar[tuple[str, ...]] = ("tokenizer", "data")

    tokenizer: str = ""
    """Folder or hub name of the tokenizer (needed)."""
    variant: Literal["ema"] | None = None
    """ema: the averaged weights of the tokenizer's training."""
    features: Literal["auto", "fvd-i3d-styleganv", "fvd-i3d-tfhub", "frechet-random-i3d"] = "auto"
    """Features of the Frechet distance. auto: the first whose weights are found (`larp-mllm fetch i3d`), last an I3D with random weights."""
    i3d: Path | None = None
    """Path of i3d_torchscript.pt; by default LARP_I3D or the cache folder."""
    repeats: int = 20
    """Bootstrap repeats for the deviation of the Frechet distance."""

    def __post_init__(self):
        super().__post_init__()
        self.check_at_least(repeats=2)

    def open_features(self) -> ClipFeatures:
        """Load the features of the Frechet distance."""
        return open_features(self.features, self.i3d, self.device)

    def open_lpips(self) -> lpips.Lpips | None:
        """Load LPIPS; None if its weights are not found."""
        return lpips.Lpips.load().to(self.device) if lpips.available() else None

    def protocol(self, preset: Protocol, features: ClipFeatures, shape: ClipShape, **changes: Any) -> Protocol:
        """Return the protocol `preset` with the data, clip length, stride, features and seed of this run, and with `changes`."""
        # Of several sets that are joined, the first name would not be that of all.
        parts = split_specs(self.data)
        dataset = _DATASETS.get(parts[0].partition(":")[0], self.data) if len(parts) == 1 else self.data
        run = dict(dataset=dataset, frames=shape.frames, features=features.name, seed=self.seed)
        protocol = replace(preset, **run | changes)
        if shape.stride == 1:
            return protocol
        return replace(protocol, frame_rule=f"{protocol.frame_rule}, stride {shape.stride}")


@dataclass(frozen=True)
class GeneratorEvaluationConfig(GuidedSampling, FrechetConfig):
    """The options of evaluations that measure the Frechet distance of generated clips; ValueError for values out of range."""

    needed: ClassVar[tuple[str, ...]] = ("generator", "tokenizer", "data")

    generator: str = ""
    """Folder or hub name of the generator (needed). The tokenizer must be the one that it was trained with."""

    def __post_init__(self):
        FrechetConfig.__post_init__(self)
        GuidedSampling.__post_init__(self)

    def open_models(self, task: Task) -> tuple[LarpGenerator, LarpTokenizer]:
        """Load generator and tokenizer; ValueError if an option is missing or they do not fit the task or each other."""
        self.check_paths()
        return load_pair(self.generator, self.tokenizer, task, self.device, self.variant)


def write_sheet(videos: Sequence[np.ndarray], captions: Iterable[str], out: Path, **layout: int) -> list[str]:
    """Write a contact sheet of uint8 videos (T, H, W, 3) beside the record `out`, with the suffix .png; return its path in a list.

    captions: one for each video; further ones are ignored. layout: as in `contact_sheet`. Without videos nothing is written and
    the list is empty.
    """
    if not videos:
        return []
    path = out.with_suffix(".png")
    contact_sheet(videos, list(captions)[: len(videos)], path, **layout)
    return [str(path)]


def last_lines(report: dict) -> list[str]:
    """Return the last lines of a printed report: the skipped videos and the paths of the pictures."""
    return [*(f"skipped {entry['name']}: {entry['reason']}" for entry in report["skipped"]), *report["files"]]


def run_evaluation(
    script: str,
    config: type[Config],
    evaluate: Callable[[Config], dict],
    describe: Callable[[dict], str],
    argv: Sequence[str] | None = None,
) -> dict:
    """Run a script (its __file__) with the command line `argv`, by default the program's own: evaluate, then print.

    `config` has the field `out`, where `evaluate` writes the record that is returned. ValueError for mistakes of the user.
    """
    path = Path(script).resolve()
    chosen, _ = parse(config, sys.argv[1:] if argv is None else argv, path.parent / "recipes", path.name)
    keep_freed_memory()  # a third of the time of I3D's features
    report = evaluate(chosen)
    print(describe(report))
    print(chosen.out)
    return report
