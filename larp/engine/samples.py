"""Clips that show what a generator has learned, while it trains and at the end.

Shapes: n clips, T frames, H x W pixels.
"""

from dataclasses import dataclass
from pathlib import Path

from larp.data.clips import clip_to_frames
from larp.data.contact_sheet import Gallery, contact_sheet
from larp.data.token_cache import TokenCache
from larp.engine.distributed import Ranks, barrier, gather_objects, reduce_sum
from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.models.tokenizer import LarpTokenizer
from larp.sampling.options import GuidedSampling
from larp.sampling.sample import generate, guidance_scales

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

GUIDANCE = 1.25
"""Guidance scale where unconditional clips were trained on and none is asked for; that of the paper."""
OLD_FPS = 12
"""Frames per second of clips whose token cache does not know it."""
_BATCH = 8


@dataclass(frozen=True)
class SamplingConfig(GuidedSampling):
    """The clips that are sampled in training; ValueError for values out of range."""

    every: int = 0
    """Steps from one contact sheet samples/step-NUMBER.png of the weights of that moment to the next; 0 makes none."""
    clips: int = 16
    """How many, then and when training ends; class-conditional runs go round the classes. 0 samples nothing."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance; 1 is off. By default 1.25 if conditions are dropped in training (condition_dropout), else 1."""

    def __post_init__(self):
        for name in ("every", "clips"):
            if getattr(self, name) < 0:
                raise ValueError(f"sampling.{name} is {getattr(self, name)}; it must be 0 (none) or more")
        self.resolve(GUIDANCE)

    @property
    def guided(self) -> bool:
        """Whether a guidance other than 1 is asked for."""
        return any(scale not in (None, 1) for scale in (self.guidance_scale, self.guidance_final))

    def resolve(self, default: float) -> GuidedSampling:
        """The options for `generate`, with `default` as the guidance scale where none is asked for."""
        return GuidedSampling.of(self, **({"guidance_scale": default} if self.guidance_scale is None else {}))


class Samples:
    """A fixed list of conditions with a name each, for which any state of a generator writes clips; the ranks share it out.

    Args:
        clips: how many.
        sampling: how their codes are sampled.
        tokenizer: the LarpTokenizer of the codes, on the device of the generator.
        held_out: the cache whose given frames frame prediction goes on from, and whose frame rate the clips get.
        model_config: the `GeneratorConfig`.
        seed: of the sampling; each clip keeps its random numbers from one state of the generator to the next.
        ranks: this process among those that take part. All methods are collective.
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
        # An interval without a code is an error now, not in the middle of a training.
        guidance_scales(sampling, tokenizer.num_tokens)
        self.sampling, self.tokenizer, self.seed, self.ranks = sampling, tokenizer, seed, ranks
        self.fps = held_out.frame_rate(OLD_FPS)
        self.names, self.condition = _conditions(clips, model_config, held_out)

    def sample(self, model: LarpGenerator) -> list[np.ndarray]:
        """Write all clips with the weights that the model has now, as uint8 (T, H, W, 3) frames; whole on every rank."""
        count, ranks = len(self.names), self.ranks
        own = range(count * ranks.rank // ranks.world_size, count * (ranks.rank + 1) // ranks.world_size)
        videos = []
        for first in tqdm(own[::_BATCH], desc="sampling clips", leave=False, disable=not ranks.is_main):
            rows = self.condition[first : min(first + _BATCH, own.stop)]
            codes = generate(model, rows, self.sampling, seed=self.seed, first_row=first, progress=ranks.is_main)
            videos += [clip_to_frames(clip) for clip in self.tokenizer.decode(codes)]
        return [video for part in gather_objects(videos) for video in part]

    def write_sheet(self, model: LarpGenerator, path: Path) -> None:
        """Write a contact sheet of clips of this moment."""
        videos = self.sample(model)
        if self.ranks.is_main:
            contact_sheet(videos, self.names, path)

    def write_gallery(self, model: LarpGenerator, folder: Path) -> str:
        """Write each clip as an MP4, and all on folder/sheet.png; return the path of the sheet."""
        videos, gallery = self.sample(model), Gallery(folder, self.fps)
        if self.ranks.is_main:
            for name, video in zip(self.names, videos, strict=True):
                gallery.add(name, video)
            gallery.write_sheet()
        barrier()
        return str(folder / "sheet.png")


def tokenizer_of(held_out: TokenCache, ranks: Ranks) -> LarpTokenizer | None:
    """Load the tokenizer that a cache names; None if that fails on any rank, with the reason on the screen. Collective.

    For what a run can do without: a model is worth more than its samples.
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
    """Return names and conditions of the clips: the classes in turn, or given frames of held-out clips, evenly spaced."""
    if config.task == "class":
        labels = torch.arange(clips) % config.num_classes
        return [config.class_names[label] for label in labels.tolist()], labels
    count = min(clips, len(held_out))
    rows = torch.arange(count) * len(held_out) // count
    names = [held_out.names[row].rsplit(".", 1)[0] for row in rows.tolist()]
    return names, held_out.batch(rows, config.task)[1]
