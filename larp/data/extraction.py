"""From videos to a token cache: which windows of a video are taken, and the loop that encodes them.

Shapes: N codes of a clip, T frames.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from larp.data import token_cache as tokens
from larp.data.clips import ClipShape, frames_to_clip
from larp.data.datasets import VideoItem, VideoSet
from larp.data.loader import ClipLoader, in_order
from larp.data.token_cache import INDEX, TokenCache, token_key
from larp.data.video import ShortVideoError, VideoError, VideoInfo, iter_frames, probe, read_video

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

# Clips in one pass of the tokenizer.
_BATCH, _GPU_BATCH = 16, 64


class Window(NamedTuple):
    """A clip of a video."""

    start: int
    """Its first frame in the file."""
    clip: Tensor
    """float32 (3, T, H, W)."""
    fps: float
    """Its frames per second."""


def window_starts(frames: int, shape: ClipShape, most: int = 1, hop: int | None = None) -> list[int]:
    """Return the first frames of the clips that are taken from a video of `frames` frames.

    As many windows as fit without overlap, but at most `most`, with equal gaps before, between and after them: a single
    window lies in the middle. With `hop` they begin at the frames 0, hop, 2 * hop, ... instead. A video shorter than one
    window has none.
    """
    if hop is not None:
        return list(range(0, frames - shape.span + 1, hop))[:most]
    count = min(most, frames // shape.span)
    slack = frames - count * shape.span
    return [index * shape.span + slack * (index + 1) // (count + 1) for index in range(count)]


def extract_tokens(
    tokenizer,
    videos: VideoSet,
    split: str,
    folder: str | Path,
    *,
    stride: int = 1,
    windows: int = 1,
    hop: int | None = None,
    flips: bool = False,
    condition_frames: int = 0,
    batch_size: int | None = None,
    workers: int = 2,
    tokenizer_name: str = "",
    variant: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> TokenCache:
    """Encode windows of all videos into a token cache and open it; every rank calls this, and gets the whole cache.

    Shards that are there already are kept, so a stopped extraction goes on, even with another number of ranks. Videos
    that cannot be read, or are shorter than a window, are skipped and listed in the cache.

    Args:
        tokenizer: a LarpTokenizer, on the device that it should run on.
        videos, split: the data, and the name of the split for the key.
        stride: every n-th frame of the video is a frame of the clip.
        windows, hop: clips of a video at most, and frames from the start of one to the next, see `window_starts`.
        flips: take each window mirrored as well.
        condition_frames: 0, or how many first frames of a window are the given ones of frame prediction: their clip,
            filled up with copies of the last given frame, is encoded beside.
        batch_size, workers: clips in one pass of the tokenizer (by default 16, and 64 on a GPU), threads that decode.
        tokenizer_name, variant: path or hub name, and which weights of it, noted in the cache.
        rank, world_size, barrier: the ranks that share the work, and how they wait for each other.

    Raises TokenCacheError if the folder was begun with other settings or cannot be written, or if no video could be
    read; then no cache is left behind, so that the next run tries the videos again.
    """
    shape = ClipShape(*tokenizer.config.clip_shape, stride)
    check_counts(windows, batch_size, workers)
    device = next(tokenizer.parameters()).device
    if batch_size is None:
        batch_size = _GPU_BATCH if device.type == "cuda" else _BATCH
    if hop is not None and hop < shape.span:
        raise ValueError(f"hop is {hop}: windows reach over {shape.span} frames and would overlap")
    _check_given(condition_frames, 0, shape.frames)
    folder = Path(folder)
    key = token_key(tokenizer, videos, split, stride, windows, hop, flips, condition_frames)
    tokens.begin_cache(folder, key)
    slices = tokens.shard_slices(len(videos.items))
    own = [shard for shard in range(rank, len(slices), world_size) if not tokens.shard_path(folder, shard).is_file()]
    bar = tqdm(total=sum(len(slices[shard]) for shard in own), desc="encoding videos", unit="video", disable=rank > 0)
    with bar:
        for shard in own:
            items = videos.items[slices[shard].start : slices[shard].stop]
            rows = _Rows(tokenizer, device, flips, condition_frames, batch_size)
            found = in_order(lambda item: _windows_or_error(item, shape, windows, hop), items, workers)
            for number, item, clips in zip(slices[shard], items, found, strict=True):
                rows.add(number, item, clips)
                bar.update()
            tokens.write_shard(tokens.shard_path(folder, shard), *rows.finish())
    barrier()
    skipped = tokens.nothing_encoded(folder, len(slices))
    barrier()  # every rank has looked, and all raise below
    if rank == 0 and skipped:
        tokens.discard_cache(folder, len(slices))
    elif rank == 0 and not (folder / INDEX).is_file():
        tokens.finish_cache(folder, key, videos.classes, tokenizer_name, len(slices), variant)
    barrier()
    if skipped:
        names = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
        raise tokens.TokenCacheError(
            f"{videos.spec}: not one video could be encoded ({names}); no cache was left in {folder}: mend the videos,"
            " or give others with --data, and run again"
        )
    return TokenCache.open(folder, key)


def check_counts(windows: int, batch_size: int | None, workers: int) -> None:
    """Raise ValueError for numbers with which `extract_tokens` cannot work."""
    if windows < 1:
        raise ValueError(f"windows is {windows}; at least one clip of each video is needed")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; at least one clip is needed in a pass of the tokenizer")
    if workers < 0:
        raise ValueError(f"workers is {workers}; it must be 0 (no threads, videos are decoded in turn) or more")


def live_batches(
    tokenizer, loader: ClipLoader, task: str, condition_frames: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield codes int64 (b, N) and the generator's condition of a loader's micro batches, encoded as they are asked for.

    What `TokenCache.batch` returns, without a cache: other windows in each epoch, and the tokenizer's time in each step.
    The loader resumes and shares out the work; `condition_frames` are for the task "frame-prediction". Raises
    ValueError for a number of them that no clip has, and for a video without a class where the task is "class".
    """
    if task != "class":
        _check_given(condition_frames, 1, tokenizer.config.num_frames)
    device = next(tokenizer.parameters()).device
    for batch in loader:
        clips = batch["clip"].to(device)
        codes = tokenizer.encode(clips)
        if task == "class":
            if (batch["label"] < 0).any():
                raise ValueError("a video has no class: train with --task frame-prediction, or give a label to each")
            yield codes, batch["label"].to(device)
        else:
            given = tokenizer.encode(repeat_last(clips, condition_frames))
            yield codes, tokens.with_separator(given, tokenizer.codebook_size)


def _check_given(condition_frames: int, least: int, frames: int) -> None:
    if not least <= condition_frames < frames:
        none = "0 (none)" if least == 0 else str(least)
        raise ValueError(
            f"condition_frames is {condition_frames}; it must be {none} to {frames - 1}, because clips have {frames} frames"
            + ("; frame prediction needs 1 at least" if least == 0 else "")
        )


def read_windows(item: VideoItem, shape: ClipShape, windows: int, hop: int | None = None) -> list[Window]:
    """Read the windows of a video that `window_starts` chooses. Raises VideoError."""
    info = probe(item.path)
    try:
        return _cut(item, shape, window_starts(info.frames, shape, windows, hop), info)
    except ShortVideoError as error:
        # Headers promise too many frames now and then; what decodes decides.
        if error.frames >= info.frames:
            raise
        held = replace(info, frames=error.frames)
        return _cut(item, shape, window_starts(held.frames, shape, windows, hop), held)


def _cut(item: VideoItem, shape: ClipShape, starts: list[int], info: VideoInfo) -> list[Window]:
    if not starts:
        raise ShortVideoError(f"{item.path}: has {info.frames} frames, the clip needs {shape.span}", info.frames)
    if len(starts) == 1:
        pictures = [read_video(item.path, starts[0], shape.frames, shape.stride)[0]]
    else:
        pictures = _stream(item.path, shape, starts)
    return [
        Window(start, frames_to_clip(part, shape.height, shape.width), info.fps / shape.stride)
        for start, part in zip(starts, pictures, strict=True)
    ]


def _stream(path: Path, shape: ClipShape, starts: list[int]) -> Iterator[np.ndarray]:
    """Yield the frames of windows, uint8 (T, H, W, 3), in one pass that holds one window at a time."""
    ahead, part = iter(starts), []
    start = next(ahead)
    for index, frame in enumerate(iter_frames(path)):
        if index >= start and (index - start) % shape.stride == 0:
            part.append(frame)
        if len(part) == shape.frames:
            yield np.stack(part)
            start, part = next(ahead, None), []
            if start is None:
                return
    held = index + 1
    raise ShortVideoError(f"{path}: a window begins at frame {start}, but the video holds {held} frames", held)


def _windows_or_error(item: VideoItem, shape: ClipShape, windows: int, hop: int | None) -> list[Window] | VideoError:
    try:
        return read_windows(item, shape, windows, hop)
    except VideoError as error:
        return error


class _Rows:
    """Collects the rows of one shard and encodes them in batches."""

    def __init__(self, tokenizer, device: torch.device, flips: bool, condition_frames: int, batch_size: int):
        self.tokenizer, self.device = tokenizer, device
        self.flips, self.given, self.batch_size = flips, condition_frames, batch_size
        self.waiting: list[Tensor] = []
        self.codes: list[Tensor] = []
        self.conditions: list[Tensor] = []
        self.rows: list[tuple[int, int, int, bool]] = []
        self.fps: list[float] = []
        self.videos: list[list] = []
        self.skipped: list[list[str]] = []

    def add(self, number: int, item: VideoItem, windows: list[Window] | VideoError) -> None:
        """Take the windows of a video, or note why it has none."""
        if isinstance(windows, VideoError):
            self.skipped.append([item.name, str(windows)])
            return
        self.videos.append([number, item.name, item.caption])
        label = -1 if item.label is None else item.label
        for window in windows:
            for flipped in (False, True) if self.flips else (False,):
                self.rows.append((label, number, window.start, flipped))
                self.fps.append(window.fps)
                self.waiting.append(window.clip.flip(-1) if flipped else window.clip)
                if len(self.waiting) == self.batch_size:
                    self._encode()

    def _encode(self) -> None:
        # Moved first: what a GPU does with clips (ranges, given frames) would take a core longer than the encoder takes.
        clips = torch.stack(self.waiting).to(self.device)
        self.waiting = []
        self.codes.append(self.tokenizer.encode(clips).cpu())
        if self.given:
            self.conditions.append(self.tokenizer.encode(repeat_last(clips, self.given)).cpu())

    def finish(self) -> tuple[dict[str, Tensor], list[list], list[list[str]]]:
        """Encode what waits and return (columns, videos, skipped) as `write_shard` takes them."""
        if self.waiting:
            self._encode()
        small = torch.int16 if self.tokenizer.codebook_size <= 2**15 else torch.int32
        empty = torch.empty(0, self.tokenizer.num_tokens, dtype=torch.int64)
        numbers = torch.tensor(self.rows, dtype=torch.int64).reshape(-1, 4).unbind(1)
        columns = dict(zip(("labels", "videos", "starts"), numbers, strict=False)) | {"flipped": numbers[3].bool()}
        columns["fps"] = torch.tensor(self.fps, dtype=torch.float64)
        columns["codes"] = torch.cat([empty, *self.codes]).to(small)
        if self.given:
            columns["conditions"] = torch.cat([empty, *self.conditions]).to(small)
        return {name: column.contiguous() for name, column in columns.items()}, self.videos, self.skipped


def repeat_last(clips: Tensor, given: int) -> Tensor:
    """Keep the first `given` frames of clips (B, 3, T, H, W) and replace the others by copies of the last of them."""
    last = clips[:, :, given - 1 : given].expand(-1, -1, clips.shape[2] - given, -1, -1)
    return torch.cat([clips[:, :, :given], last], dim=2)
