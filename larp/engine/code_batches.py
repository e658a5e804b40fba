"""Training data of a generator: rows of a token cache, or clips encoded on the fly.

`open_data` makes either from the options of training/train_generator.py. The clips of a step are a function of its
number, so that a resumed run continues with the same ones.

Shapes: b clips of a micro batch, N codes of a clip.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from larp.data.clips import ClipShape
from larp.data.datasets import VideoSet, open_videos
from larp.data.extraction import extract_tokens, live_batches
from larp.data.in_memory_clips import ResidentClips
from larp.data.listing import skipped_lines
from larp.data.loader import ClipLoader
from larp.data.token_cache import TokenCache, batch_rows, token_key
from larp.engine.distributed import Ranks, barrier, main_first
from larp.engine.generator_settings import TrainGeneratorConfig
from larp.engine.settings import micro_batch
from larp.models.tokenizer import LarpTokenizer

from torch import Tensor

SHARED = ("tokenizer", "num_tokens", "codebook_size", "frames", "stride", "code_version")
"""What of the training data's key the held-out clips must share; for frame prediction `condition_frames` too."""


class CodeBatch(NamedTuple):
    """One micro batch of one rank."""

    offset: int
    """Position of its first clip in the global batch."""
    codes: Tensor
    """int64 (b, N)."""
    condition: Tensor
    """Labels int64 (b,), or given codes and separator (b, N + 1)."""


class CachedCodes:
    """The clips of a token cache, in a new order each epoch.

    Args:
        cache: with the labels or conditions that the task needs.
        task: "class" or "frame-prediction".
        global_batch, micro_batch: clips of a step over all ranks, and of one pass on one rank.
        seed: of the order.
        ranks: this process among those that share a step.
    """

    def __init__(self, cache: TokenCache, task: str, global_batch: int, micro_batch: int, seed: int, ranks: Ranks):
        self.cache, self.task, self.seed, self.ranks = cache, task, seed, ranks
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.classes, self.skipped = cache.classes, list(cache.skipped)

    def __len__(self) -> int:
        """Number of clips in an epoch."""
        return len(self.cache)

    @property
    def key(self) -> dict[str, Any]:
        """Everything that the codes depend on, see `larp.data.token_cache.token_key`."""
        return self.cache.key

    def clips_of(self, step: int) -> list[str]:
        """Return the names of the videos of a step, of all ranks."""
        return [
            self.cache.names[row] for row in batch_rows(len(self.cache), step, self.global_batch, self.seed).tolist()
        ]

    def step(self, step: int) -> Iterator[CodeBatch]:
        """Yield this rank's micro batches of a step: a contiguous slice of the global batch, in equal parts."""
        rows = batch_rows(len(self.cache), step, self.global_batch, self.seed)
        own = self.global_batch // self.ranks.world_size
        for offset in range(self.ranks.rank * own, (self.ranks.rank + 1) * own, self.micro_batch):
            chosen = rows[offset : offset + self.micro_batch]
            yield CodeBatch(offset, *self.cache.batch(chosen, self.task, self.ranks.device))


class LiveCodes:
    """Clips at random positions of the videos, encoded at every step.

    Other than a cache this needs no disk space and covers all of a long video, but decodes and encodes in every step.

    Args:
        tokenizer: a LarpTokenizer on its device.
        videos: the data; ValueError if the task is "class" and a video has no class.
        task, global_batch, micro_batch, seed, ranks: as for `CachedCodes`.
        stride: a clip takes every `stride`-th frame.
        flips: mirror half of the clips.
        condition_frames: given frames of frame prediction.
        workers: threads that decode ahead.
        crop: cut the clips as `ResidentClips` does, none reversed in time.
    """

    def __init__(
        self,
        tokenizer,
        videos: VideoSet,
        task: str,
        global_batch: int,
        micro_batch: int,
        seed: int,
        ranks: Ranks,
        *,
        stride: int = 1,
        flips: bool = False,
        condition_frames: int = 0,
        workers: int = 2,
        crop: bool = False,
    ):
        lacking = sum(item.label is None for item in videos.items)
        if task == "class" and (lacking or not videos.classes):
            raise ValueError(
                f"{videos.spec}: {lacking} of {len(videos)} videos have no class. Data with classes: ucf101:ROOT, shapes:,"
                " k600:, shards with .cls and manifests with a label for every video; or train with --task frame-prediction"
            )
        shape = ClipShape(*tokenizer.config.clip_shape, stride)
        self.tokenizer, self.task, self.condition_frames = tokenizer, task, condition_frames
        shared = (videos, shape, global_batch, micro_batch, seed, ranks.rank, ranks.world_size)
        if crop:
            self.loader = ResidentClips(*shared, flip=flips, reverse=False, device=ranks.device)
        else:
            self.loader = ClipLoader(*shared, flip=flips, workers=workers)
        self.classes, self.videos = videos.classes, videos
        key = token_key(tokenizer, videos, "train", stride, 1, None, flips, condition_frames)
        self.key = key | {"windows": f"one at a random place{', cropped' if crop else ''}, encoded on the fly"}
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None

    def __len__(self) -> int:
        """Number of clips in an epoch: one of each video."""
        return len(self.videos)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(name, reason) of the videos that this rank could not use so far."""
        return self.loader.skipped

    def clips_of(self, step: int) -> list[str]:
        """Return the names of the videos of a step, of all ranks."""
        return self.loader.clips_of(step)

    def step(self, step: int) -> Iterator[CodeBatch]:
        """Yield this rank's micro batches of a step: a contiguous slice of the global batch, in equal parts."""
        loader = self.loader
        if self._batches is None or (loader.step, loader.micro) != (step, 0):
            loader.step, loader.micro = step, 0
            self._batches = live_batches(self.tokenizer, loader, self.task, self.condition_frames)
        for row in range(0, loader.rank_rows, loader.micro_batch):
            # Cloned, because autograd cannot use tensors made in the tokenizer's inference mode.
            yield CodeBatch(loader.rank_offset + row, *(part.clone() for part in next(self._batches)))


def open_data(
    config: TrainGeneratorConfig, ranks: Ranks
) -> tuple[CachedCodes | LiveCodes, TokenCache, LarpTokenizer | None]:
    """Return what to train and to validate on, extracted first if need be, and the tokenizer where that needed it. Collective.

    Raises ValueError if the two do not fit together, or lack what the task needs.
    """
    micro = micro_batch(config.batch_size, config.engine.accumulation, ranks)
    sizes = (config.task, config.batch_size, micro, config.seed, ranks)
    opened = _open_videos if config.tokens is None else _open_cache
    source, tokenizer, held_out = opened(config, sizes, ranks)
    if held_out is None:
        shared = (*SHARED, "condition_frames") if config.task == "frame-prediction" else SHARED
        held_out = TokenCache.open(config.eval_tokens, {name: source.key[name] for name in shared})
    held_out.require(config.task, str(config.eval_tokens or config.eval_data or config.data), source.classes)
    return source, held_out, tokenizer


def _open_cache(
    config: TrainGeneratorConfig, sizes: tuple, ranks: Ranks
) -> tuple[CachedCodes, LarpTokenizer | None, TokenCache | None]:
    """The clips of a token cache, the tokenizer where it is named, and what is held out of the cache, if anything."""
    if config.eval_tokens is not None and config.eval_tokens.resolve() == config.tokens.resolve():
        raise ValueError(
            f"eval_tokens {config.eval_tokens} is the same cache as tokens {config.tokens}, so nothing would be held out:"
            " give --eval-tokens another, or leave it out"
        )
    cache, held_out = TokenCache.open(config.tokens), None
    tokenizer = cache.load_tokenizer(config.tokenizer, ranks.device) if config.tokenizer else None
    if config.eval_tokens is None:
        cache, held_out = cache.hold_out()
    cache.require(config.task, str(config.tokens))
    return CachedCodes(cache, *sizes), tokenizer, held_out


def _open_videos(
    config: TrainGeneratorConfig, sizes: tuple, ranks: Ranks
) -> tuple[CachedCodes | LiveCodes, LarpTokenizer, TokenCache | None]:
    """The clips of videos, extracted now or encoded at every step, their tokenizer, and held-out ones unless there is a cache."""
    if not (config.tokenizer and config.data):
        raise ValueError(
            "nothing to train on: give --tokens DIR (made by training/extract_tokens.py), or --tokenizer and --data"
            " to extract tokens first (or, with --live, at every step), for example --tokenizer runs/tokenizer/model"
            " --data shapes:"
        )
    tokenizer = LarpTokenizer.from_pretrained(config.tokenizer, device=ranks.device)
    said: set[str] = set()
    if config.live:
        source = LiveCodes(
            tokenizer, _open_split(config.data, "train", ranks, said), *sizes, stride=config.stride,
            flips=config.flips, condition_frames=config.given_frames, workers=config.workers,
            crop=config.crop,
        )  # fmt: skip
    else:
        cache = _extract_split(config, tokenizer, config.data, "train", ranks, said)
        cache.require(config.task, config.data)
        source = CachedCodes(cache, *sizes)
    if config.eval_tokens is not None:
        return source, tokenizer, None
    return source, tokenizer, _extract_split(config, tokenizer, config.eval_data or config.data, "test", ranks, said)


def _open_split(data: str, split: str, ranks: Ranks, said: set[str]) -> VideoSet:
    """List the videos of one split of a data spec, and say what is missing, unless it is in `said`."""
    videos = main_first(lambda: open_videos(data, split))  # the first process writes the indices of shards
    for note in videos.notes if ranks.is_main else ():
        if note not in said:
            print(note)
    said.update(videos.notes)
    return videos


def _extract_split(
    config: TrainGeneratorConfig, tokenizer: LarpTokenizer, data: str, split: str, ranks: Ranks, said: set[str]
) -> TokenCache:
    """Extract the tokens of one split of a data spec into the run folder."""
    folder = config.out / f"tokens-{split}"
    if ranks.is_main:
        print(f"tokens of {data} ({split}) go to {folder}; give --tokens to use a cache that is there already")
    train = split == "train"
    cache = extract_tokens(
        tokenizer, _open_split(data, split, ranks, said), split, folder,
        stride=config.stride, windows=config.windows if train else 1, flips=config.flips and train,
        condition_frames=config.given_frames, workers=config.workers, tokenizer_name=config.tokenizer,
        rank=ranks.rank, world_size=ranks.world_size, barrier=barrier,
    )  # fmt: skip
    for line in skipped_lines(cache.skipped) if ranks.is_main else ():
        print(line)
    return cache
