"""Batches of clips: infinite, resumable and sharded over ranks for training; one pass over a set for evaluation.

The video, start frame and flip at a global position (step * global_batch + row) are functions of the seed and that
position only, not of ranks, workers, accumulation or earlier reads.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from itertools import islice
from typing import Literal, TypeVar

from larp.data.clips import ClipShape, choose_start, pixels_to_clip, resize_frames
from larp.data.datasets import VideoSet
from larp.data.frame_times import FrameTimes
from larp.data.listing import StoredItems
from larp.data.video import ShortVideoError, VideoError, frame_times, iter_frames, read_clip

import numpy as np
import torch
from tqdm import tqdm

Argument = TypeVar("Argument")
Result = TypeVar("Result")


_DECODE_THREADS = 2
_ORDER, _SAMPLE, _REPLACE = 1, 2, 3  # separate the random streams of one position


class ClipLoader:
    """An infinite iterator over the micro batches of one rank, as dicts.

    Keys: `clip` float32 (b, 3, T, H, W) in [0, 1]; `label` int64 (b,), -1 for none; `index` int64 (b,) into
    `videos.items`; `caption` list of str, "" for none; `sample_offset`, position of row 0 in the global batch; `step`.

    Videos that are unreadable or too short are replaced by others of the set and listed in `skipped`.

    Args:
        videos, shape: the data, and the shape of a clip.
        global_batch: rows of a step; rank r takes the r-th contiguous slice.
        micro_batch: rows of a batch.
        seed: of order, start frames and flips.
        rank, world_size: of this process.
        shuffle: a new order in each epoch, and random start frames; otherwise the order of the set, and centred clips.
        flip: mirror half of the clips.
        workers: threads that read ahead.
        in_memory: decode every video once, at the clip's height and width.
        memory_gb: limit in GiB; beyond it `in_memory` warns and decodes on the fly.

    Raises ValueError if global_batch is no multiple of micro_batch * world_size, VideoError if no video can be read.
    """

    def __init__(
        self,
        videos: VideoSet,
        shape: ClipShape,
        global_batch: int,
        micro_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        flip: bool = False,
        workers: int = 0,
        in_memory: bool = False,
        memory_gb: float = 8.0,
    ):
        if (
            not 0 <= rank < world_size
            or min(global_batch, micro_batch) < 1
            or global_batch % (micro_batch * world_size)
        ):
            raise ValueError(
                f"global_batch={global_batch} must be a multiple of micro_batch={micro_batch} x "
                f"world_size={world_size} (rank {rank})"
            )
        self.shape, self.seed, self.shuffle, self.flip, self.workers = shape, seed, shuffle, flip, workers
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank_rows = global_batch // world_size
        self.rank_offset = rank * self.rank_rows
        self.step, self.micro = 0, 0
        self._source = _Source(videos, shape)
        self._order: tuple[int, np.ndarray] | None = None
        self._fingerprint = _fingerprint(videos)
        if in_memory:
            self._source.load_all(memory_gb, quiet=rank != 0)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(name, reason) of the videos that this rank could not use, sorted by name."""
        return self._source.skipped

    def __iter__(self) -> Iterator[dict]:
        step, micro = self.step, self.micro
        with closing(in_order(self._row, self._positions(step, micro), self.workers)) as rows:
            while True:
                batch = _collate(list(islice(rows, self.micro_batch)), self._source.videos)
                offset = self.rank_offset + micro * self.micro_batch
                # Advanced before the yield, so that a state saved after this batch does not repeat it.
                self.step, self.micro = self._after(step, micro)
                yield {**batch, "sample_offset": offset, "step": step}
                step, micro = self._after(step, micro)

    def clips_of(self, step: int) -> list[str]:
        """Return the names of the videos of a step, of all ranks; one that cannot be read has another in its place."""
        first = step * self.global_batch
        return [self._name(self._index(position)) for position in range(first, first + self.global_batch)]

    def _name(self, index: int) -> str:
        return self._source.videos.items[index].name

    def state_dict(self) -> dict:
        """Return the position and the identity of the data as JSON-serialisable values."""
        return {"step": self.step, "micro": self.micro, "micro_batch": self.micro_batch, **self._identity()}

    def load_state_dict(self, state: dict) -> None:
        """Resume with the micro batch after a saved position.

        Raises ValueError if seed, global batch, shape or videos differ, or if the position is inside a step and the
        micro batch size differs.
        """
        if wrong := [
            f"{key}: saved {state.get(key)}, now {value}"
            for key, value in self._identity().items()
            if state.get(key) != value
        ]:
            stored = isinstance(self._source.videos.items, StoredItems) and state.get("videos") != self._fingerprint
            raise ValueError(
                f"the data loader cannot resume, because the data is not the same: {'; '.join(wrong)}"
                f"{' (size and time of shards and of saved data sets count)' if stored else ''}. Give the options of the "
                "first run, or train in another folder"
            )
        if state["micro"] and (state["micro_batch"] != self.micro_batch):
            raise ValueError(
                f"the loader was saved within a step at micro_batch={state['micro_batch']}, now {self.micro_batch}; "
                "resume with the same, or save at whole steps"
            )
        self.step, self.micro = state["step"], state["micro"]

    def _identity(self) -> dict:
        shape = self.shape
        return {
            "seed": self.seed,
            "global_batch": self.global_batch,
            "clip_shape": [shape.frames, shape.height, shape.width, shape.stride],
            "shuffle": self.shuffle,
            "flip": self.flip,
            "videos": self._fingerprint,
        }

    def _after(self, step: int, micro: int) -> tuple[int, int]:
        """Return the position of the next micro batch."""
        return (step, micro + 1) if (micro + 1) * self.micro_batch < self.rank_rows else (step + 1, 0)

    def _positions(self, step: int, micro: int) -> Iterator[int]:
        """Yield the global positions of this rank's rows from a micro batch on, without end."""
        while True:
            first = step * self.global_batch + self.rank_offset + micro * self.micro_batch
            yield from range(first, first + self.micro_batch)
            step, micro = self._after(step, micro)

    def _row(self, position: int) -> tuple[int, np.ndarray]:
        """Read the clip at a global position: the index of its video, and its frames, uint8 (T, H, W, 3)."""
        sample = np.random.default_rng((self.seed, _SAMPLE, position)).random(2)
        u = float(sample[0]) if self.shuffle else None
        count = len(self._source.videos)
        index, frames = self._index(position), None
        if (frames := self._source.clip(index, u)) is None:
            for other in np.random.default_rng((self.seed, _REPLACE, position)).permutation(count):
                if (frames := self._source.clip(int(other), u)) is not None:
                    index = int(other)
                    break
        if frames is None:
            raise VideoError(_no_readable_video(self._source))
        return index, frames[:, :, ::-1] if self.flip and sample[1] < 0.5 else frames

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, self._count())
        if not self.shuffle:
            return place
        order = self._order  # read once, because worker threads may replace it
        if order is None or order[0] != epoch:
            order = self._order = (
                epoch,
                np.random.default_rng((self.seed, _ORDER, epoch)).permutation(self._count()),
            )
        return int(order[1][place])

    def _count(self) -> int:
        """Number of videos in an epoch."""
        return len(self._source.videos)


class FixedPass:
    """One pass over a rank's share of a set, see `iterate_once`.

    Yields dicts as `ClipLoader` does, without sample_offset and step; the last batch may be smaller. len() is the number
    of batches if no video is skipped.
    """

    def __init__(self, videos, shape, batch, rank, world_size, start, seed, workers):
        if batch < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch={batch} must be at least 1, and rank={rank} in [0, world_size={world_size})")
        if isinstance(start, str) and start not in ("centre", "random"):
            raise ValueError(f"start={start!r}; choose centre, random, or a frame number")
        self._source, self._batch, self._start, self._seed, self._workers = (
            _Source(videos, shape),
            batch,
            start,
            seed,
            workers,
        )
        count = len(videos)
        self._indices = range(count * rank // world_size, count * (rank + 1) // world_size)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(name, reason) of the videos of this rank's share that could not be used."""
        return self._source.skipped

    def __len__(self) -> int:
        return -(-len(self._indices) // self._batch)

    def __iter__(self) -> Iterator[dict]:
        rows: list[tuple[int, np.ndarray]] = []
        for index, frames in zip(self._indices, in_order(self._read, self._indices, self._workers), strict=True):
            if frames is not None:
                rows.append((index, frames))
            if len(rows) == self._batch:
                yield _collate(rows, self._source.videos)
                rows = []
        if rows:
            yield _collate(rows, self._source.videos)

    def _read(self, index: int) -> np.ndarray | None:
        if isinstance(self._start, int):
            return self._source.clip(index, None, first=self._start)
        random = self._start == "random"
        return self._source.clip(
            index, float(np.random.default_rng((self._seed, _SAMPLE, index)).random()) if random else None
        )


def iterate_once(
    videos: VideoSet,
    shape: ClipShape,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
    start: Literal["centre", "random"] | int = "centre",
    seed: int = 0,
    workers: int = 0,
) -> FixedPass:
    """Return an iterator over this rank's contiguous share of a set; all ranks together see every video once.

    Clips start at frame `start`, in the centre, or at random by `seed` and the video's index. `workers` threads read
    ahead. Raises ValueError for invalid numbers.
    """
    return FixedPass(videos, shape, batch, rank, world_size, start, seed, workers)


def in_order(
    function: Callable[[Argument], Result], arguments: Iterable[Argument], workers: int, ahead: int = 4
) -> Iterator[Result]:
    """Yield function(argument) for each argument in order, computed by `workers` threads.

    At most `ahead` results per thread are computed in advance, which bounds the memory. Without workers each result is
    computed on demand. An exception is raised at the position of its result. When the iterator is closed or an
    exception ends it, running calls are awaited and pending ones cancelled.
    """
    if not workers:
        yield from map(function, arguments)
        return
    pending: deque = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for argument in arguments:
                pending.append(pool.submit(function, argument))
                if len(pending) > ahead * workers:
                    yield _pop_result(pending)
            while pending:
                yield _pop_result(pending)
        finally:
            running = [call for call in pending if not call.cancel()]
            # A second Ctrl-C while the pool joins its threads makes Python before 3.13 lose track of them, and torch
            # aborts the process if a thread outlives the interpreter. Waiting here avoids that.
            wait(running)


def _pop_result(pending: deque) -> Result:
    result = pending[0].result()  # removed only afterwards, so that `finally` above waits for it
    pending.popleft()
    return result


class _Source:
    """Reads clips of a set by index, from memory or from files, and records videos that cannot be used."""

    def __init__(self, videos: VideoSet, shape: ClipShape):
        if not videos.items:
            raise ValueError(f"{videos.spec}: the set holds no video")
        self.videos, self.shape = videos, shape
        self._memory: dict[int, np.ndarray] | None = None
        self._times: dict[int, FrameTimes] = {}  # of the videos that have been counted
        self._reasons: dict[int, str] = {}

    @property
    def skipped(self) -> list[tuple[str, str]]:
        return sorted((self.videos.items[index].name, reason) for index, reason in list(self._reasons.items()))

    def clip(self, index: int, u: float | None, first: int | None = None) -> np.ndarray | None:
        """Return uint8 (T, H, W, 3) frames, or None if the video is unreadable or too short (see `skipped`)."""
        if index in self._reasons:
            return None
        try:
            if self._memory is not None:
                video = self._memory[index]
                begin = _begin(self._times[index], self.shape, u) if first is None else first
                return video[begin : begin + self.shape.span : self.shape.stride]
            return self._read(index, u, first)
        except ValueError as error:
            self._reasons[index] = str(error).removeprefix(f"{self.videos.items[index].path}: ")
            return None

    def _read(self, index: int, u: float | None, first: int | None) -> np.ndarray:
        shape, path = self.shape, self.videos.items[index].path
        if first is None and index not in self._times:
            self._times[index] = frame_times(path)
        begin = _begin(self._times[index], shape, u) if first is None else first
        try:
            frames = read_clip(path, begin, shape.frames, shape.stride)
        except ShortVideoError as error:
            if first is not None:
                raise
            # Damaged: select again among the frames that decode.
            begin = _begin(self._times[index].first(error.frames), shape, u)
            frames = read_clip(path, begin, shape.frames, shape.stride)
        return resize_frames(frames, shape.height, shape.width)

    def load_all(self, memory_gb: float, quiet: bool) -> None:
        """Decode every video at the clip's size; warn and keep reading files if that exceeds `memory_gb` GiB."""
        count, used, memory, budget = len(self.videos), 0, {}, memory_gb * 2**30
        rows = in_order(self._decode, range(count), _DECODE_THREADS)
        bar = tqdm(rows, total=count, desc="decoding videos", unit="video", delay=1, disable=quiet)
        for index, video in enumerate(bar):
            if video is not None:
                memory[index] = video
                used += video.nbytes
            expected = max(used, used * count / (index + 1) if index >= 31 else 0)
            if expected > budget:
                warnings.warn(
                    f"{self.videos.spec}: all videos at {self.shape.height}x{self.shape.width} need about "
                    f"{expected / 2**30:.1f} GiB, over memory_gb={memory_gb:g}; decoding on the fly instead "
                    "(raise memory_gb to keep them in memory)",
                    stacklevel=4,
                )
                return
        if not memory:
            raise VideoError(_no_readable_video(self))
        self._memory = memory

    def take_memory(self) -> dict[int, np.ndarray] | None:
        """Return the videos that `load_all` decoded, by index, and release them; None if they did not fit."""
        memory, self._memory = self._memory, None
        return memory

    def _decode(self, index: int) -> np.ndarray | None:
        shape, item = self.shape, self.videos.items[index]
        try:
            parts, chunk = [], []
            for frame in iter_frames(item.path):
                chunk.append(frame)
                if len(chunk) == 32:
                    parts.append(resize_frames(np.stack(chunk), shape.height, shape.width))
                    chunk = []
            if chunk:
                parts.append(resize_frames(np.stack(chunk), shape.height, shape.width))
            count = sum(map(len, parts))
            choose_start(count, shape)
            self._times[index] = frame_times(item.path).first(count)
            return np.concatenate(parts)
        except ValueError as error:
            self._reasons[index] = str(error).removeprefix(f"{self.videos.items[index].path}: ")
            return None


def _begin(times: FrameTimes, shape: ClipShape, u: float | None) -> int:
    """Return the first frame of a clip as `choose_start` does, by time where the frames come at uneven times."""
    return times.window(choose_start(times.count, shape, u), shape.span)


def _fingerprint(videos: VideoSet) -> str:
    if isinstance(videos.items, StoredItems):
        return videos.items.fingerprint
    return hashlib.sha256(os.fsencode("\n".join(item.name for item in videos.items))).hexdigest()[:16]


def _collate(rows: list[tuple[int, np.ndarray]], videos: VideoSet) -> dict:
    clips = torch.stack([pixels_to_clip(frames) for _, frames in rows])
    return {"clip": clips, **video_labels([index for index, _ in rows], videos)}


def video_labels(indices: list[int], videos: VideoSet) -> dict:
    """Return label, index and caption of a batch of the videos `indices`, as in `ClipLoader`."""
    items = [videos.items[index] for index in indices]
    return {
        "label": torch.tensor([-1 if item.label is None else item.label for item in items], dtype=torch.int64),
        "index": torch.tensor(indices, dtype=torch.int64),
        "caption": [item.caption or "" for item in items],
    }


def _no_readable_video(source: _Source) -> str:
    name, reason = source.skipped[0]
    return f"{source.videos.spec}: none of the {len(source.videos)} videos can be used; the first, {name}: {reason}"
