"""Samples of a generator during and after its training.

Shapes: T frames, H x W pixels.
"""

from dataclasses import dataclass
from pathlib import Path

from larp.data.clips import clip_to_frames
from larp.data.contact_sheet import Gallery, contact_sheet
from larp.data.token_cache import TokenCache
from larp.engine.distributed import Ranks, barrier, gather_objects, reduce_sum
from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.models.tokenizer import LarpTokenizer
from larp.sampling.guidance import guidance_scales
from larp.sampling.options import GuidedSampling
from larp.sampling.sample import generate

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

GUIDANCE = 1.25
"""Default guidance scale of a model trained with condition dropout; that of the paper."""
OLD_FPS = 12
"""Frames per second for token caches that store none."""
_BATCH = 8


@dataclass(frozen=True)
class SamplingConfig(GuidedSampling):
    """The clips that are sampled in training."""

    every: int = 0
    """Steps between contact sheets samples/step-NUMBER.png of the current weights; 0 writes none."""
    clips: int = 16
    """Number of clips, cycling through the classes of a class-conditional model; 0 samples nothing."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance; 1 is off. By default 1.25 with condition dropout in training (condition_dropout), else 1."""

    def __post_init__(self):
        for name in ("every", "clips"):
            if getattr(self, name) < 0:
                raise ValueError(f"sampling.{name} is {getattr(self, name)}; it must be 0 (none) or more")
        self.resolve(GUIDANCE)

    @property
    def guided(self) -> bool:
        """Whether a guidance scale other than 1 is set."""
        return any(scale not in (None, 1) for scale in (self.guidance_scale, self.guidance_final))

    def resolve(self, default: float) -> GuidedSampling:
        """Return the options for `generate`, with `default` as the guidance scale if none is set."""
        return GuidedSampling.of(self, **({"guidance_scale": default} if self.guidance_scale is None else {}))


class Samples:
    """Samples clips for a fixed list of named conditions; the ranks share the work, and all methods are collective.

    Args:
        clips: number of clips.
        sampling: how their codes are sampled.
        tokenizer: the LarpTokenizer of the codes, on the device of the generator.
        held_out: cache with the given frames for frame prediction, and the frame rate of the clips.
        model_config: the `GeneratorConfig`.
        seed: of the sampling; each clip uses the same random numbers in every call.
        ranks: this process among all.
    """

    def __init__(
        self,
        clips: int,
        sampling: GuidedSampling,
        tokenizer: LarpTokenizer,
        held_out: TokenCache,
        model_config: GeneratorConfig,
        seed: int,
        ranks: Ranks,
    ):
        # A guidance interval without a code is reported before training.
        guidance_scales(sampling, tokenizer.num_tokens)
        self.sampling, self.tokenizer, self.seed, self.ranks = sampling, tokenizer, seed, ranks
        self.fps = held_out.frame_rate(OLD_FPS)
        self.names, self.condition = _conditions(clips, model_config, held_out)

    def sample(self, model: LarpGenerator) -> list[np.ndarray]:
        """Return all clips sampled with the current weights, uint8 (T, H, W, 3), on every rank."""
        count, ranks = len(self.names), self.ranks
        own = range(count * ranks.rank // ranks.world_size, count * (ranks.rank + 1) // ranks.world_size)
        videos = []
        for first in tqdm(own[::_BATCH], desc="sampling clips", leave=False, disable=not ranks.is_main):
            rows = self.condition[first : min(first + _BATCH, own.stop)]
            codes = generate(model, rows, self.sampling, seed=self.seed, first_row=first, progress=ranks.is_main)
            videos += [clip_to_frames(clip) for clip in self.tokenizer.decode(codes)]
        return [video for part in gather_objects(videos) for video in part]

    def write_sheet(self, model: LarpGenerator, path: Path) -> None:
        """Write a contact sheet of clips sampled with the current weights."""
        videos = self.sample(model)
        if self.ranks.is_main:
            contact_sheet(videos, self.names, path)

    def write_gallery(self, model: LarpGenerator, folder: Path) -> str:
        """Write each clip as an MP4 and a contact sheet, folder/sheet.png; return the path of the sheet."""
        videos, gallery = self.sample(model), Gallery(folder, self.fps)
        if self.ranks.is_main:
            for name, video in zip(self.names, videos, strict=True):
                gallery.add(name, video)
            gallery.write_sheet()
        barrier()
        return str(folder / "sheet.png")


def tokenizer_of(held_out: TokenCache, ranks: Ranks) -> LarpTokenizer | None:
    """Load the tokenizer of a cache; if that fails on any rank, print the reason and return None. Collective.

    Training runs without samples in that case.
    """
    tokenizer, reason = None, "another process cannot load the tokenizer"
    try:
        tokenizer = held_out.load_tokenizer(device=ranks.device)
    except ValueError as error:
        reason = str(error)
    if reduce_sum(torch.tensor(float(tokenizer is None))).item():
        if ranks.is_main:
            print(f"no samples: {reason}")
        return None
    return tokenizer


def _conditions(clips: int, config: GeneratorConfig, held_out: TokenCache) -> tuple[list[str], Tensor]:
    """Return names and conditions: the classes in turn, or the given frames of evenly spaced held-out clips."""
    if config.task == "class":
        labels = torch.arange(clips) % config.num_classes
        return [config.class_names[label] for label in labels.tolist()], labels
    count = min(clips, len(held_out))
    rows = torch.arange(count) * len(held_out) // count
    names = [held_out.names[row].rsplit(".", 1)[0] for row in rows.tolist()]
    return names, held_out.batch(rows, config.task)[1]
