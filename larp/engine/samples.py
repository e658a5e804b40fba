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
from larp.sampling.sample import Guidance, check_sampling, generate

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
class SamplingConfig:
    """The clips that are sampled in training; ValueError for values out of range."""

    every: int = 0
    """Steps from one contact sheet samples/step-NUMBER.png of the weights of that moment to the next; 0 makes none."""
    clips: int = 16
    """How many, then and when training ends; class-conditional runs go round the classes. 0 samples nothing."""
    guidance: float | None = None
    """Guidance scale; 1 is off. By default 1.25 if conditions are dropped in training (condition_dropout), else 1."""
    guidance_final: float | None = None
    """Guidance scale of the last guided code, to which it changes in a straight line."""
    guidance_start: float = 0.0
    """No guidance before this share of a clip's codes."""
    guidance_stop: float = 1.0
    """No guidance from this share of a clip's codes on."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    """Draw among codes with this share of the likeliest one's probability; 0 keeps all."""

    def __post_init__(self):
        for name in ("every", "clips"):
            if getattr(self, name) < 0:
                raise ValueError(f"sampling.{name} is {getattr(self, name)}; it must be 0 (none) or more")
        check_sampling(self.temperature, self.top_k, self.top_p, self.ramp(GUIDANCE), self.min_p)

    @property
    def guided(self) -> bool:
        """Whether a guidance other than 1 is asked for."""
        return any(scale not in (None, 1) for scale in (self.guidance, self.guidance_final))

    def ramp(self, default: float) -> Guidance:
        """The guidance over the codes of a clip, with `default` as its scale where none is asked for."""
        scale = default if self.guidance is None else self.guidance
        return Guidance(scale, self.guidance_final, self.guidance_start, self.guidance_stop)


class Samples:
    """A fixed list of conditions with a name each, for which any state of a generator writes clips; the ranks share it out.

    Args:
        config: how many and how.
        guidance: over the codes of a clip.
        tokenizer: the LarpTokenizer of the codes, on the device of the generator.
        held_out: the cache whose given frames frame prediction goes on from, and whose frame rate the clips get.
        model_config: the `GeneratorConfig`.
        seed: of the sampling; each clip keeps its random numbers from one state of the generator to the next.
        ranks: this process among those that take part. All methods are collective.
    """

    def __init__(
        self,
        config: SamplingConfig,
        guidance: Guidance,
        tokenizer: LarpTokenizer,
        held_out: TokenCache,
        model_config: GeneratorConfig,
        seed: int,
        ranks: Ranks,
    ):
        # An interval without a code is an error now, not in the middle of a training.
        guidance.scales(tokenizer.num_tokens)
        self.config, self.guidance, self.tokenizer, self.seed, self.ranks = config, guidance, tokenizer, seed, ranks
        self.fps = held_out.frame_rate(OLD_FPS)
        self.names, self.condition = _conditions(config.clips, model_config, held_out)

    def sample(self, model: LarpGenerator) -> list[np.ndarray]:
        """Write all clips with the weights that the model has now, as uint8 (T, H, W, 3) frames; whole on every rank."""
        count, ranks = len(self.names), self.ranks
        own = range(count * ranks.rank // ranks.world_size, count * (ranks.rank + 1) // ranks.world_size)
        names = ("temperature", "top_k", "top_p", "min_p")
        options = {name: getattr(self.config, name) for name in names} | {"guidance": self.guidance, "seed": self.seed}
        videos = []
        for first in tqdm(own[::_BATCH], desc="sampling clips", leave=False, disable=not ranks.is_main):
            rows = self.condition[first : min(first + _BATCH, own.stop)]
            codes = generate(model, rows, first_row=first, progress=ranks.is_main, **options)
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
