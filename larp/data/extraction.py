"""From videos to a token cache: which windows of a video are taken, and the loop that encodes them.

Shapes: N codes of a clip, T frames.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from larp.data import tokens
from larp.data.clips import ClipShape, frames_to_clip
from larp.data.datasets import VideoItem, VideoSet
from larp.data.tokens import INDEX, TokenCache, token_key
from larp.data.video import ShortVideoError, VideoError, count_frames, read_video

import torch
from torch import Tensor
from tqdm import tqdm

READ_AHEAD = 8
"""Videos decoded before they are needed; bounds the memory."""


def window_starts(frames: int, shape: ClipShape, most: int = 1) -> list[int]:
    """Return the first frames of the clips that are taken from a video of `frames` frames.

    As many windows as fit without overlap, but at most `most`, with equal gaps before, between and after them: a single
    window lies in the middle. A video shorter than one window has none.
    """
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
    flips: bool = False,
    condition_frames: int = 0,
    batch_size: int = 16,
    workers: int = 2,
    tokenizer_name: str = "",
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
        windows: clips of a video at most, see `window_starts`.
        flips: take each window mirrored as well.
        condition_frames: 0, or how many first frames of a window are the given ones of frame prediction: their clip,
            filled up with copies of the last given frame, is encoded beside.
        batch_size, workers: clips in one pass of the tokenizer, threads that decode.
        tokenizer_name: path or hub name, noted in the cache.
        rank, world_size, barrier: the ranks that share the work, and how they wait for each other.

    Raises TokenCacheError if the folder was begun with other settings or cannot be written, or if no video could be
    read; then no cache is left behind, so that the next run tries the videos again.
    """
    shape = ClipShape(*tokenizer.config.clip_shape, stride)
    if windows < 1:
        raise ValueError(f"windows is {windows}; at least one clip of each video is needed")
    if not 0 <= condition_frames < shape.frames:
        raise ValueError(
            f"condition_frames is {condition_frames}; it must be 0 (none) to {shape.frames - 1},"
            f" because clips have {shape.frames} frames"
        )
    folder = Path(folder)
    key = token_key(tokenizer, videos, split, stride, windows, flips, condition_frames)
    tokens.begin_cache(folder, key)
    slices = tokens.shard_slices(len(videos.items))
    own = [shard for shard in range(rank, len(slices), world_size) if not tokens.shard_path(folder, shard).is_file()]
    bar = tqdm(total=sum(len(slices[shard]) for shard in own), desc="encoding videos", unit="video", disable=rank > 0)
    with bar, ThreadPoolExecutor(max(1, workers)) as pool:
        for shard in own:
            items = [(number, videos.items[number]) for number in slices[shard]]
            rows = _Rows(tokenizer, flips, condition_frames, batch_size)
            for number, item, clips in _read_ahead(pool, items, shape, windows):
                rows.add(number, item, clips)
                bar.update()
            tokens.write_shard(tokens.shard_path(folder, shard), *rows.finish())
    barrier()
    skipped = tokens.nothing_encoded(folder, len(slices))
    barrier()  # every rank has looked, and all raise below
    if rank == 0 and skipped:
        tokens.discard_cache(folder, len(slices))
    elif rank == 0 and not (folder / INDEX).is_file():
        tokens.finish_cache(folder, key, videos.classes, tokenizer_name, len(slices))
    barrier()
    if skipped:
        names = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
        raise tokens.TokenCacheError(
            f"{videos.spec}: not one video could be encoded ({names}); no cache was left in {folder}: mend the videos,"
            " or give others with --data, and run again"
        )
    return TokenCache.open(folder, key)


def read_windows(item: VideoItem, shape: ClipShape, windows: int) -> list[tuple[int, Tensor]]:
    """Read the windows of a video: (first frame, clip float32 (3, T, H, W)) of each. Raises VideoError."""
    promised = count_frames(item.path)
    try:
        return _cut(item, shape, window_starts(promised, shape, windows), promised)
    except ShortVideoError as error:
        # Headers promise too many frames now and then; what decodes decides.
        if error.frames >= promised:
            raise
        return _cut(item, shape, window_starts(error.frames, shape, windows), error.frames)


def _cut(item: VideoItem, shape: ClipShape, starts: list[int], frames: int) -> list[tuple[int, Tensor]]:
    if not starts:
        raise ShortVideoError(f"{item.path}: has {frames} frames, the clip needs {shape.span}", frames)
    pictures, _ = read_video(item.path, starts[0], starts[-1] + shape.span - starts[0])
    chosen = [pictures[start - starts[0] :][: shape.span : shape.stride] for start in starts]
    return [
        (start, frames_to_clip(part, shape.height, shape.width)) for start, part in zip(starts, chosen, strict=True)
    ]


def _read_ahead(
    pool: ThreadPoolExecutor, items: Sequence[tuple[int, VideoItem]], shape: ClipShape, windows: int
) -> Iterator[tuple]:
    """Yield (number, item, windows or VideoError) in order, while threads decode a few videos ahead."""

    def read(item: VideoItem) -> list | VideoError:
        try:
            return read_windows(item, shape, windows)
        except VideoError as error:
            return error

    pending: deque = deque()
    for number, item in items:
        pending.append((number, item, pool.submit(read, item)))
        if len(pending) > READ_AHEAD:
            number, item, future = pending.popleft()
            yield number, item, future.result()
    for number, item, future in pending:
        yield number, item, future.result()


class _Rows:
    """Collects the rows of one shard and encodes them in batches."""

    def __init__(self, tokenizer, flips: bool, condition_frames: int, batch_size: int):
        self.tokenizer, self.flips, self.given, self.batch_size = tokenizer, flips, condition_frames, batch_size
        self.waiting: list[Tensor] = []
        self.codes: list[Tensor] = []
        self.conditions: list[Tensor] = []
        self.rows: list[tuple[int, int, int, bool]] = []
        self.videos: list[list] = []
        self.skipped: list[list[str]] = []

    def add(self, number: int, item: VideoItem, windows: list | VideoError) -> None:
        """Take the windows of a video, or note why it has none."""
        if isinstance(windows, VideoError):
            self.skipped.append([item.name, str(windows)])
            return
        self.videos.append([number, item.name, item.caption])
        label = -1 if item.label is None else item.label
        for start, clip in windows:
            for flipped in (False, True) if self.flips else (False,):
                self.rows.append((label, number, start, flipped))
                self.waiting.append(clip.flip(-1) if flipped else clip)
                if len(self.waiting) == self.batch_size:
                    self._encode()

    def _encode(self) -> None:
        clips = torch.stack(self.waiting)
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
        columns["codes"] = torch.cat([empty, *self.codes]).to(small)
        if self.given:
            columns["conditions"] = torch.cat([empty, *self.conditions]).to(small)
        return {name: column.contiguous() for name, column in columns.items()}, self.videos, self.skipped


def repeat_last(clips: Tensor, given: int) -> Tensor:
    """Keep the first `given` frames of clips (B, 3, T, H, W) and replace the others by copies of the last of them."""
    last = clips[:, :, given - 1 : given].expand(-1, -1, clips.shape[2] - given, -1, -1)
    return torch.cat([clips[:, :, :given], last], dim=2)
