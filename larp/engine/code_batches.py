"""What a generator trains on, step by step: rows of a token cache, or clips that are encoded as they are needed.

Both know from the number of a step which clips belong to it, so that a resumed run goes on with the same ones.

Shapes: b clips of a micro batch, N codes of a clip.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from larp.data.clips import ClipShape
from larp.data.datasets import VideoSet
from larp.data.extraction import live_batches
from larp.data.loader import ClipLoader
from larp.data.token_cache import TokenCache, batch_rows, token_key
from larp.engine.distributed import Ranks

from torch import Tensor


class CodeBatch(NamedTuple):
    """One micro batch of one rank."""

    offset: int
    """The place of its first clip in the global batch."""
    codes: Tensor
    """int64 (b, N)."""
    condition: Tensor
    """Labels int64 (b,), or given codes and separator (b, N + 1)."""


class CachedCodes:
    """The clips of a token cache, in a new order each epoch.

    Args:
        cache: of clips that have what the task needs.
        task: "class" or "frame-prediction".
        global_batch, micro_batch: clips of a step over all ranks, and of one pass on one rank.
        seed: of the order.
        ranks: this process among those that share a step out.
    """

    def __init__(self, cache: TokenCache, task: str, global_batch: int, micro_batch: int, seed: int, ranks: Ranks):
        self.cache, self.task, self.seed, self.ranks = cache, task, seed, ranks
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.classes, self.skipped = cache.classes, list(cache.skipped)

    def __len__(self) -> int:
        """Clips of an epoch."""
        return len(self.cache)

    @property
    def key(self) -> dict[str, Any]:
        """Everything that changes a code, see `larp.data.token_cache.token_key`."""
        return self.cache.key

    def step(self, step: int) -> Iterator[CodeBatch]:
        """Yield this rank's micro batches of a step: a contiguous slice of the global batch, in equal parts."""
        rows = batch_rows(len(self.cache), step, self.global_batch, self.seed)
        own = self.global_batch // self.ranks.world_size
        for offset in range(self.ranks.rank * own, (self.ranks.rank + 1) * own, self.micro_batch):
            chosen = rows[offset : offset + self.micro_batch]
            yield CodeBatch(offset, *self.cache.batch(chosen, self.task, self.ranks.device))


class LiveCodes:
    """Clips at random places of videos, other ones in each epoch, encoded at every step.

    A cache saves the tokenizer's time and the decoding; this needs no disk, and sees all of a long video.

    Args:
        tokenizer: a LarpTokenizer, on the device that it should run on.
        videos: the data; ValueError if the task is "class" and one has none.
        stride, flips: every n-th frame makes a clip; mirror half of the clips.
        condition_frames: given frames of frame prediction.
        workers: threads that decode ahead.
        task, global_batch, micro_batch, seed, ranks: as for `CachedCodes`.
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
    ):
        lacking = sum(item.label is None for item in videos.items)
        if task == "class" and (lacking or not videos.classes):
            raise ValueError(
                f"{videos.spec}: {lacking} of {len(videos)} videos have no class. Data with classes: ucf101:ROOT, shapes:,"
                " k600: and manifests with a label for every video; or train with --task frame-prediction"
            )
        shape = ClipShape(*tokenizer.config.clip_shape, stride)
        self.tokenizer, self.task, self.condition_frames = tokenizer, task, condition_frames
        self.loader = ClipLoader(
            videos, shape, global_batch, micro_batch, seed, ranks.rank, ranks.world_size, flip=flips, workers=workers
        )
        self.classes, self.videos = videos.classes, videos
        key = token_key(tokenizer, videos, "train", stride, 1, None, flips, condition_frames)
        self.key = key | {"windows": "one at a random place, encoded on the fly"}
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None

    def __len__(self) -> int:
        """Clips of an epoch: one of each video."""
        return len(self.videos)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(name, reason) of the videos that this rank could not use so far."""
        return self.loader.skipped

    def step(self, step: int) -> Iterator[CodeBatch]:
        """Yield this rank's micro batches of a step: a contiguous slice of the global batch, in equal parts."""
        loader = self.loader
        if self._batches is None or (loader.step, loader.micro) != (step, 0):
            loader.step, loader.micro = step, 0
            self._batches = live_batches(self.tokenizer, loader, self.task, self.condition_frames)
        for row in range(0, loader.rank_rows, loader.micro_batch):
            # Cloned, because what comes out of the tokenizer's inference mode cannot take part in a gradient.
            yield CodeBatch(loader.rank_offset + row, *(part.clone() for part in next(self._batches)))
