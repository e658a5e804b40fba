"""Encode videos to a token cache, which generator and language-model training read.

    python training/extract_tokens.py --tokenizer runs/tok/model --data shapes: --split train --out runs/tok/tokens

Also under `deepspeed` or `torchrun`: every process encodes its share of the videos. A stopped run goes on when it is
started again.
"""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from larp.config import parse
from larp.data.datasets import open_videos
from larp.data.extraction import check_counts, extract_tokens
from larp.data.listing import skipped_lines
from larp.data.token_cache import TokenCache
from larp.data.token_rows import chunks
from larp.engine import backend
from larp.engine.distributed import all_agree, main_first
from larp.engine.signals import check_stop, run_script
from larp.models.tokenizer import LarpTokenizer

import torch

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class ExtractTokensConfig:
    """Encode videos to a token cache."""

    tokenizer: str = "runs/tokenizer/model"
    """Folder of a trained tokenizer (runs/NAME/model), or a hub name."""
    variant: Literal["ema"] | None = None
    """ema: the averaged weights of the tokenizer, where training kept them."""
    data: str = "shapes:"
    """Data spec of the videos."""
    split: Literal["train", "validation", "test", "all"] = "train"
    out: Path = Path("runs/tokens")
    """Folder of the cache."""
    windows: int = 1
    """Most clips of a video. They never overlap and are evenly spaced; one lies in the middle."""
    hop: int | None = None
    """Frames from the start of one clip to the start of the next, the first at frame 0, in place of even spacing."""
    stride: int = 1
    """Every n-th frame of a video is a frame of a clip."""
    flips: bool = False
    """Encode every clip mirrored as well; the language model skips a mirrored clip whose caption says left or right."""
    augmented: int = 0
    """In place of windows: so many clips of each video at random places, with random speed (strides 1 to 3), crop and colours, as
    --crop cuts them for the tokenizer. All videos are kept in memory."""
    condition_frames: int = 0
    """For frame prediction: number of given frames at the start of a clip, 1 to T - 1 (5 in the paper). Their codes are stored as well."""
    batch_size: int | None = None
    """Clips in one pass of the tokenizer; by default 16 on a CPU and 64 on a GPU."""
    workers: int = 2
    """Threads of each process that decode videos; with 0, decoding and encoding take turns."""
    share: str = "1/1"
    """K/N: encode the K-th of N shares of the data. N machines that share --out work without knowing of each other, and the last one
    completes the cache; one that died is started again alone."""

    @property
    def machine(self) -> tuple[int, int]:
        """K and N of `share`. Raises ValueError unless they are whole numbers, 1 <= K <= N."""
        found = re.fullmatch(r"(\d+)/(\d+)", self.share)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(
                f"share is {self.share!r}; it must be K/N with 1 <= K <= N, such as 1/4 to 4/4 on four machines"
            )
        return int(found[1]), int(found[2])


def main(argv: list[str] | None = None) -> TokenCache | None:
    """Run the command line `argv` (by default the program's own); ValueError for mistakes of the user."""
    config, _ = parse(ExtractTokensConfig, sys.argv[1:] if argv is None else argv, RECIPES, "extract_tokens.py")
    return extract(config)


def extract(config: ExtractTokensConfig) -> TokenCache | None:
    """Extract as `config` says, on every rank; return the whole cache, or None while shares of other machines are missing."""
    machine = config.machine
    check_counts(config.windows, config.batch_size, config.workers)  # before the tokenizer is loaded
    ranks = backend.start(seed=0)
    try:
        tokenizer = LarpTokenizer.from_pretrained(config.tokenizer, device=ranks.device, variant=config.variant)
        # The first process writes the indices of shards, which the others read.
        videos = main_first(lambda: open_videos(config.data, config.split))
        for note in videos.notes if ranks.is_main else ():
            print(note)
        cache = extract_tokens(
            tokenizer,
            videos,
            config.split,
            config.out,
            stride=config.stride,
            windows=config.windows,
            hop=config.hop,
            flips=config.flips,
            augmented=config.augmented,
            condition_frames=config.condition_frames,
            batch_size=config.batch_size,
            workers=config.workers,
            tokenizer_name=config.tokenizer,
            variant=config.variant,
            rank=ranks.rank,
            world_size=ranks.world_size,
            barrier=backend.barrier,
            agree=all_agree,
            check_stop=check_stop,
            share=machine,
        )
        if ranks.is_main and cache is None:
            print(f"share {config.share} is done; the cache in {config.out} is complete when all shares are")
        elif ranks.is_main:
            report(cache, config.out)
        return cache
    finally:
        backend.finish()


def report(cache: TokenCache, folder: Path) -> None:
    """Print what a cache holds, and which videos were skipped and why."""
    used, videos = torch.zeros(cache.codebook_size, dtype=torch.bool), 0
    for rows in chunks(len(cache)):
        videos += len(cache.take("videos", rows).unique())
        for part in rows.split(4096):
            used[cache.take("codes", part).long().flatten()] = True
    print(f"{folder}: {len(cache)} clips of {videos} videos, {cache.num_tokens} codes each; ", end="")
    print(
        f"{int(used.sum())} of {cache.codebook_size} codes are in use; {cache.frame_rate(math.nan):g} frames per second"
    )
    if cache.skipped:
        print(f"{len(cache.skipped)} videos were skipped:")
        for line in skipped_lines(cache.skipped):
            print(f"  {line}")


if __name__ == "__main__":
    run_script("extract_tokens.py", main)
