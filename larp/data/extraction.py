"""Encodes videos into a token cache: selects windows of each video and runs the tokenizer over them.

Shapes: N codes of a clip, T frames.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from larp.data import token_cache as tokens
from larp.data.clips import ClipShape, frames_to_clip
from larp.data.datasets import VideoItem, VideoSet
from larp.data.frame_times import FrameTimes
from larp.data.in_memory_clips import NUM_RANDOM, ResidentClips
from larp.data.listing import StoredItems
from larp.data.loader import ClipLoader, in_order
from larp.data.token_cache import INDEX, TokenCache, token_key
from larp.data.video import ShortVideoError, VideoError, frame_times, iter_frames, read_clip

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

# Clips per forward pass of the tokenizer, on a CPU and on a GPU.
_BATCH, _GPU_BATCH = 16, 64
_AUGMENT = 5  # random stream of augmented windows


class Window(NamedTuple):
    """A clip of a video."""

    start: int
    """Index of its first frame in the file."""
    clip: Tensor
    """float32 (3, T, H, W) in [0, 1]."""
    fps: float
    """Frames per second of the clip, by the times of its frames."""
    flipped: bool = False
    """Whether it is mirrored."""


def window_starts(frames: int, shape: ClipShape, most: int = 1, hop: int | None = None) -> list[int]:
    """Return the first frames of the windows of a video of `frames` frames; none if it is shorter than a window.

    As many windows as fit without overlap, at most `most`, with equal gaps before, between and after them, so that a
    single window is centred. With `hop`, windows start at frames 0, hop, 2 * hop, ... instead.
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
    augmented: int = 0,
    condition_frames: int = 0,
    batch_size: int | None = None,
    workers: int = 2,
    tokenizer_name: str = "",
    variant: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    agree: Callable[[bool], bool] = lambda everything: everything,
    check_stop: Callable[[], None] = lambda: None,
    share: tuple[int, int] = (1, 1),
) -> TokenCache | None:
    """Encode windows of all videos into a token cache and return the opened cache. Collective: every rank calls it.

    Returns None while the shards of other machines are missing, see `share`. Existing shards are reused, so that an interrupted
    extraction resumes, even with another number of ranks. Videos that cannot be read or are shorter than a window are skipped and
    listed in the cache.

    Args:
        tokenizer: a LarpTokenizer on its device.
        videos, split: the data, and the name of the split for the key.
        folder: of the cache.
        stride: a clip takes every `stride`-th frame of the video.
        windows, hop: maximum clips per video, and frames from the start of one to the next, see `window_starts`.
        flips: add each window mirrored.
        augmented: in place of windows, so many random clips of each video, see `AugmentedWindows`.
        condition_frames: number of given frames for frame prediction, or 0. The given frames, padded to a clip with
            copies of the last one, are encoded as well.
        batch_size: clips per forward pass; by default 16 on a CPU and 64 on a GPU.
        workers: threads that decode videos.
        tokenizer_name, variant: path or hub name of the tokenizer and its weight variant, recorded in the cache.
        rank, world_size, barrier: this rank, the number of ranks that share the work, and their barrier.
        agree: whether all ranks pass True, for ranks that see the shards of another machine at different times. Collective.
        check_stop: called after each video; what it raises ends the work. Whole shards stay.
        share: (k, n): encode the k-th of n shares of the shards, 1 <= k <= n. The n calls, on machines that share the folder, know
            nothing of each other; whichever is last completes the cache.

    Raises TokenCacheError if the folder was begun with other settings or cannot be written, or if no video could be
    read; in the last case the cache is removed, so that the next run tries the videos again.
    """
    shape = ClipShape(*tokenizer.config.clip_shape, stride)
    check_counts(windows, batch_size, workers)
    _check_windows(shape, windows, hop, augmented)
    _check_condition_frames(condition_frames, 0, shape.frames)
    folder = Path(folder)
    key = token_key(tokenizer, videos, split, stride, windows, hop, flips, condition_frames, augmented)
    tokens.begin_cache(folder, key)
    parts = videos.items.parts if isinstance(videos.items, StoredItems) else None
    slices = tokens.shard_slices(len(videos), parts)
    number, machines = share
    own = range(rank * machines + number - 1, len(slices), world_size * machines)
    missing = {shard: slices[shard] for shard in own if not tokens.shard_path(folder, shard).is_file()}
    if augmented and missing:
        random_clips = AugmentedWindows(videos, shape, augmented, flips)
        read = partial(map, random_clips.windows_or_error)
    else:
        read = partial(in_order, lambda row: _windows_or_error(videos.items[row], shape, windows, hop), workers=workers)
    new_shard = partial(_ShardRows, tokenizer, flips and not augmented, condition_frames, batch_size)
    _encode_shards(folder, videos, missing, read, new_shard, check_stop, quiet=rank > 0)
    barrier()
    if machines > 1 and not agree(_all_there(folder, len(slices))):
        return None
    _complete(folder, key, videos, len(slices), tokenizer_name, variant, rank, barrier)
    return TokenCache.open(folder, key)


def _encode_shards(
    folder: Path,
    videos: VideoSet,
    shards: Mapping[int, range],
    read: Callable[[range], Iterator[list[Window] | VideoError]],
    new_shard: Callable[[], "_ShardRows"],
    check_stop: Callable[[], None],
    quiet: bool,
) -> None:
    """Encode and write shards of a cache, {number: numbers of its videos}. `read` yields the windows of each of some videos."""
    bar = tqdm(total=sum(map(len, shards.values())), desc="encoding videos", unit="video", disable=quiet)
    with bar:
        for shard, numbers in shards.items():
            rows = new_shard()
            for number, clips in zip(numbers, read(numbers), strict=True):
                rows.add(number, videos.items[number], clips)
                bar.update()
                check_stop()
            tokens.write_shard(tokens.shard_path(folder, shard), *rows.finish())


def _all_there(folder: Path, shards: int) -> bool:
    return all(tokens.shard_path(folder, shard).is_file() for shard in range(shards))


def _complete(
    folder: Path,
    key: Mapping[str, Any],
    videos: VideoSet,
    shards: int,
    tokenizer_name: str,
    variant: str | None,
    rank: int,
    barrier: Callable[[], None],
) -> None:
    """Write the index of a cache whose shards are all there; remove the cache and raise TokenCacheError if it has no row. Collective."""
    skipped = tokens.nothing_encoded(folder, shards)
    barrier()  # rank 0 may delete the shards only after all ranks have read them
    if rank == 0 and skipped:
        tokens.discard_cache(folder, shards)
    elif rank == 0 and not (folder / INDEX).is_file():
        tokens.finish_cache(folder, key, videos.classes, tokenizer_name, shards, variant)
    barrier()
    if skipped:
        names = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
        raise tokens.TokenCacheError(
            f"{videos.spec}: not one video could be encoded ({names}); no cache was left in {folder}: mend the videos,"
            " or give others with --data, and run again"
        )


def check_counts(windows: int, batch_size: int | None, workers: int) -> None:
    """Raise ValueError for numbers that `extract_tokens` cannot use."""
    if windows < 1:
        raise ValueError(f"windows is {windows}; at least one clip of each video is needed")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; at least one clip is needed in a pass of the tokenizer")
    if workers < 0:
        raise ValueError(f"workers is {workers}; it must be 0 (no threads, videos are decoded in turn) or more")


def _check_windows(shape: ClipShape, windows: int, hop: int | None, augmented: int) -> None:
    if augmented < 0:
        raise ValueError(f"augmented is {augmented}; it must be 0 (windows) or more")
    if augmented and (windows > 1 or hop is not None):
        raise ValueError(f"augmented is {augmented}: its clips lie at random places, so leave out windows and hop")
    if hop is not None and hop < shape.span:
        raise ValueError(f"hop is {hop}: windows reach over {shape.span} frames and would overlap")


def live_batches(
    tokenizer, loader: ClipLoader, task: str, condition_frames: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield codes int64 (b, N) and the generator's condition for each micro batch of a loader, encoded on the fly.

    The items equal those of `TokenCache.batch`. Windows differ in each epoch, and each step runs the tokenizer.
    `condition_frames` is used by the task "frame-prediction". Raises ValueError for an invalid number of condition
    frames, and for a video without a class if the task is "class".
    """
    if task != "class":
        _check_condition_frames(condition_frames, 1, tokenizer.config.num_frames)
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


def _check_condition_frames(condition_frames: int, least: int, frames: int) -> None:
    if not least <= condition_frames < frames:
        none = "0 (none)" if least == 0 else str(least)
        raise ValueError(
            f"condition_frames is {condition_frames}; it must be {none} to {frames - 1}, because clips have {frames} frames"
            + ("; frame prediction needs 1 at least" if least == 0 else "")
        )


def read_windows(item: VideoItem, shape: ClipShape, windows: int, hop: int | None = None) -> list[Window]:
    """Read the windows that `window_starts` selects from a video. Raises VideoError."""
    times = frame_times(item.path)
    try:
        return _cut(item, shape, windows, hop, times)
    except ShortVideoError as error:
        # Damaged: select again by the number of frames that decodes.
        if error.frames >= times.count:
            raise
        return _cut(item, shape, windows, hop, times.first(error.frames))


def _cut(item: VideoItem, shape: ClipShape, windows: int, hop: int | None, times: FrameTimes) -> list[Window]:
    starts = window_starts(times.count, shape, windows, hop)
    if not starts:
        raise ShortVideoError(f"{item.path}: has {times.count} frames, the clip needs {shape.span}", times.count)
    if hop is None:
        starts = _by_time(starts, shape.span, times)
    if len(starts) == 1:
        pictures = [read_clip(item.path, starts[0], shape.frames, shape.stride)]
    else:
        pictures = _stream(item.path, shape, starts)
    return [
        Window(start, frames_to_clip(part, shape.height, shape.width), times.rate(start, shape.span) / shape.stride)
        for start, part in zip(starts, pictures, strict=True)
    ]


def _by_time(starts: list[int], span: int, times: FrameTimes) -> list[int]:
    """Move windows to where they lie by time, where the frames come at uneven times; they still do not overlap."""
    moved, end = [], 0
    for index, start in enumerate(starts):
        last = times.count - (len(starts) - index) * span  # leaves room for the windows that follow
        moved.append(min(max(times.window(start, span), end), last))
        end = moved[-1] + span
    return moved


def _stream(path: Path, shape: ClipShape, starts: list[int]) -> Iterator[np.ndarray]:
    """Yield the frames of each window, uint8 (T, H, W, 3), in one decoding pass; one window is in memory at a time."""
    remaining, part = iter(starts), []
    start = next(remaining)
    for index, frame in enumerate(iter_frames(path)):
        if index >= start and (index - start) % shape.stride == 0:
            part.append(frame)
        if len(part) == shape.frames:
            yield np.stack(part)
            start, part = next(remaining, None), []
            if start is None:
                return
    held = index + 1
    raise ShortVideoError(f"{path}: a window begins at frame {start}, but the video holds {held} frames", held)


def _windows_or_error(item: VideoItem, shape: ClipShape, windows: int, hop: int | None) -> list[Window] | VideoError:
    try:
        return read_windows(item, shape, windows, hop)
    except VideoError as error:
        return error


class AugmentedWindows:
    """Random clips of each video as `larp.data.in_memory_clips.ResidentClips` cuts them: place, speed, crop and colours.

    None is reversed in time, which would contradict captions. The clips of a video depend on its number only.
    """

    def __init__(self, videos: VideoSet, shape: ClipShape, count: int, flip: bool):
        self.videos, self.count = videos, count
        self.clips = ResidentClips(videos, shape, 1, 1, seed=0, flip=flip, reverse=False)
        self.skipped = dict(self.clips.skipped)
        self.places = {number: place for place, number in enumerate(self.clips.usable)}

    def windows_or_error(self, number: int) -> list[Window] | VideoError:
        """Return the clips of the video of this number, or why it has none."""
        item = self.videos.items[number]
        if number not in self.places:
            return VideoError(self.skipped.get(item.name, f"{item.path}: cannot be read"))
        uniform = np.random.default_rng((_AUGMENT, number)).random((self.count, NUM_RANDOM))
        chosen = np.full(self.count, self.places[number])
        starts, strides, mirrored = self.clips.places(chosen, uniform)
        times, between = frame_times(item.path), self.clips.out.frames - 1
        return [
            Window(int(start), clip, times.rate(int(start), between * int(stride) + 1) / int(stride), bool(flipped))
            for start, clip, stride, flipped in zip(
                starts, self.clips.cut(chosen, uniform), strides, mirrored, strict=True
            )
        ]


class _ShardRows:
    """Collects the rows of one shard and encodes them in batches."""

    def __init__(self, tokenizer, flips: bool, condition_frames: int, batch_size: int | None):
        self.tokenizer, self.device = tokenizer, next(tokenizer.parameters()).device
        self.flips, self.given = flips, condition_frames
        self.batch_size = batch_size or (_GPU_BATCH if self.device.type == "cuda" else _BATCH)
        self.waiting: list[Tensor] = []
        self.codes: list[Tensor] = []
        self.conditions: list[Tensor] = []
        self.rows: list[tuple[int, int, int, bool]] = []
        self.fps: list[float] = []
        self.videos: list[list] = []
        self.skipped: list[list[str]] = []

    def add(self, number: int, item: VideoItem, windows: list[Window] | VideoError) -> None:
        """Add the windows of a video, or record why it has none."""
        if isinstance(windows, VideoError):
            self.skipped.append([item.name, str(windows).removeprefix(f"{item.path}: ")])
            return
        self.videos.append([number, item.name, item.caption])
        label = -1 if item.label is None else item.label
        for window in windows:
            for flipped in (False, True) if self.flips else (False,):
                self.rows.append((label, number, window.start, flipped or window.flipped))
                self.fps.append(window.fps)
                self.waiting.append(window.clip.flip(-1) if flipped else window.clip)
                if len(self.waiting) == self.batch_size:
                    self._encode()

    def _encode(self) -> None:
        # Moved first: on the CPU, preparing the clips would take longer than a GPU takes to encode them.
        clips = torch.stack(self.waiting).to(self.device)
        self.waiting = []
        self.codes.append(self.tokenizer.encode(clips).cpu())
        if self.given:
            self.conditions.append(self.tokenizer.encode(repeat_last(clips, self.given)).cpu())

    def finish(self) -> tuple[dict[str, Tensor], list[list], list[list[str]]]:
        """Encode the remaining clips and return (columns, videos, skipped), the arguments of `write_shard`."""
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
    """Replace all but the first `given` frames of clips (B, 3, T, H, W) by copies of the last given frame."""
    last = clips[:, :, given - 1 : given].expand(-1, -1, clips.shape[2] - given, -1, -1)
    return torch.cat([clips[:, :, :given], last], dim=2)
