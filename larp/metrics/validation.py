"""The validation of a tokenizer in training: the same clips each time, by the weights of the moment and by their average."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from larp.data.clips import ClipShape
from larp.data.datasets import VideoSet, evenly_spaced, open_videos
from larp.data.listing import NoSplitError
from larp.data.loader import iterate_once
from larp.engine.backend import Engine
from larp.metrics.reconstruction import Reconstruction, ValidationMetrics, reconstruct
from larp.models.tokenizer import LarpTokenizer

import torch


class TokenizerValidation:
    """Reconstructs evenly spaced validation videos, the centre of each, in one process.

    Args:
        videos: the validation set.
        shape: of the clips.
        clips: how many of the videos are used.
        workers: threads that decode.
        metrics: LPIPS and rFVD, where their weights are at hand.
    """

    def __init__(self, videos: VideoSet, shape: ClipShape, clips: int, workers: int, metrics: ValidationMetrics):
        self.videos, self.shape, self.workers, self.metrics = videos, shape, workers, metrics
        self.chosen = replace(videos, items=evenly_spaced(videos.items, clips))

    def check_readable(self) -> None:
        """Raise ValueError if none of the videos can be read."""
        clips = iterate_once(self.videos, self.shape, batch=1)
        if next(iter(clips), None) is None:
            name, reason = clips.skipped[0]
            raise ValueError(
                f"{self.videos.spec}: none of its {len(self.videos)} test videos can be read; give others with --eval-data "
                f"({name}: {reason})"
            )

    def evaluate(self, engine: Engine, pictures: Path) -> dict[str, float]:
        """Return the figures of an engine's weights, and as ema_... those of their average where there is one.

        pictures: where originals are written beside reconstructions, a path without suffix.
        """
        result = self.reconstruct(engine, engine.module)
        pictures.parent.mkdir(parents=True, exist_ok=True)
        result.write(str(pictures), fps=8)
        figures = result.metrics
        if engine.average is not None:
            averaged = self.reconstruct(engine, engine.average.module).metrics
            figures |= {f"ema_{name}": averaged[name] for name in ("psnr", "lpips") if name in averaged}
        return figures

    def reconstruct(self, engine: Engine, model: LarpTokenizer) -> Reconstruction:
        """Reconstruct the clips with a model, at the precision of the engine."""
        batches = iterate_once(self.chosen, self.shape, batch=16, workers=self.workers)
        # Compiled blocks would be compiled again for each size of a validation batch.
        with engine.autocast(), torch.compiler.set_stance("force_eager"):
            return reconstruct(model, batches, device=engine.ranks.device, metrics=self.metrics)


def open_validation(data: str, chooses: bool) -> VideoSet:
    """List the test videos of a data spec; if validation `chooses` the weights, those of the validation split, where there is one."""
    if chooses:
        with suppress(NoSplitError):
            return open_videos(data, "validation")
    return open_videos(data, "test")


def quality(figures: dict[str, float]) -> tuple[bool, float]:
    """Return a key that is larger for better weights: by LPIPS where it is known, else by PSNR.

    The figures of averaged weights count where there are any. Figures with LPIPS stand above those without.
    """
    name = "lpips" if "lpips" in figures else "psnr"
    value = figures.get(f"ema_{name}", figures[name])
    return name == "lpips", -value if name == "lpips" else value
