"""Videos from the generators: clips of a class, given frames that go on, and either of them longer than one clip.

A longer video is written window by window: its last frames are the given frames of the next window, encoded as in the
training of frame prediction. Of a window only the new frames are kept, so there is no jump in what was there before;
what the model made of the given frames themselves is measured against them, and dropped.

Shapes: B videos, F frames of a video, T frames of the tokenizer's clips, G given frames, W windows that were given
frames, H, W pixels.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from larp.data.clips import frames_to_clip
from larp.data.extraction import repeat_last
from larp.data.video import ShortVideoError, iter_frames
from larp.models.generator import LarpGenerator, Task
from larp.models.losses import psnr
from larp.models.tokenizer import LarpTokenizer
from larp.sampling.sample import generate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GIVEN = 5
"""Given frames of LARP's frame prediction on Kinetics-600."""


@dataclass(frozen=True, eq=False)
class LongClip:
    """Videos that were written window by window."""

    frames: Tensor
    """float32 (B, 3, F, H, W) in [0, 1], on the CPU."""
    seam_psnr: Tensor
    """float32 (B, W): for each window that was given frames, the PSNR in dB between them and what the model made of
    them; W is 0 for clips that come from one window without given frames."""


@torch.no_grad()
def continue_clip(
    generator: LarpGenerator,
    tokenizer: LarpTokenizer,
    frames: Tensor,
    total_frames: int,
    *,
    given: int = GIVEN,
    seed: int = 0,
    first_row: int = 0,
    **sampling: Any,
) -> LongClip:
    """Let videos go on until they have `total_frames` frames; the ones at hand stay as they are, bit for bit.

    Args:
        generator: one for frame prediction; its tokenizer's weights may lie on another device.
        frames: float (B, 3, F, H, W) in [0, 1] of the tokenizer's size, at least `given` of them.
        given: G, how many last frames each window goes on from, 1 to T - 1; best the number in training.
        seed, first_row: video i takes the random numbers of (seed, first_row + i), others in each window. A video that
            goes on twice, by whole windows, becomes the one that went on once.
        sampling: guidance, temperature, top_k, top_p, min_p, ... as in `larp.sampling.sample.generate`.

    Raises ValueError for a generator of another task or tokenizer, and for numbers that do not fit.
    """
    _check_models(generator, tokenizer, "frame-prediction")
    return _continue(generator, tokenizer, frames, total_frames, given, seed, first_row, sampling)


def sample_classes(
    generator: LarpGenerator,
    tokenizer: LarpTokenizer,
    labels: Tensor,
    total_frames: int | None = None,
    *,
    continuation: LarpGenerator | None = None,
    given: int = GIVEN,
    seed: int = 0,
    batch_size: int = 8,
    **sampling: Any,
) -> Iterator[LongClip]:
    """Yield the videos of class labels int64 (n,), in batches of at most `batch_size`.

    Args:
        generator: one for classes.
        labels: see `LarpGenerator.class_labels`.
        total_frames: F, by default T; fewer are cut, for more a `continuation` is needed.
        continuation: a generator for frame prediction, of the same tokenizer, which writes all windows but the first.
            It is guided as the first one is where it can be (`null_condition`), else not at all.
        given, seed, sampling: as in `continue_clip`. The batch size does not change what is sampled.

    Raises ValueError, at once, for models and numbers that do not fit.
    """
    length = tokenizer.config.num_frames
    total = length if total_frames is None else total_frames
    _check_models(generator, tokenizer, "class")
    _check_counts(batch_size=batch_size, total_frames=total, videos=len(labels))
    if total > length and continuation is None:
        raise ValueError(
            f"{total} frames are more than the {length} of one clip, and a generator for classes writes no more: give a"
            " generator for frame prediction that goes on from there (continuation; --continue-with RUN)"
        )
    if continuation is not None:
        _check_models(continuation, tokenizer, "frame-prediction")
        _check_given(given, tokenizer)

    def write(first: int, rows: int) -> LongClip:
        condition = labels[first : first + rows]
        codes = generate(generator, condition, seed=seed, first_row=first, **sampling)
        clip = _decode(tokenizer, codes)[:, :, :total]
        if total <= length:
            return LongClip(clip, torch.empty(len(clip), 0))
        unguided = {} if continuation.config.null_condition else {"guidance": 1.0}
        return _continue(continuation, tokenizer, clip, total, given, seed, first, sampling | unguided)

    return _in_batches(write, len(labels), batch_size)


def sample_continuations(
    generator: LarpGenerator,
    tokenizer: LarpTokenizer,
    frames: Tensor,
    videos: int,
    total_frames: int | None = None,
    *,
    given: int = GIVEN,
    seed: int = 0,
    batch_size: int = 8,
    **sampling: Any,
) -> Iterator[LongClip]:
    """Yield so many ways in which one video, float (3, F, H, W), may go on, in batches of at most `batch_size`.

    total_frames: with those at hand, by default those of one window: what is there and T - `given` more. The other
    arguments and the errors, which come at once, are those of `continue_clip`.
    """
    total = frames.shape[1] + tokenizer.config.num_frames - given if total_frames is None else total_frames
    _check_counts(batch_size=batch_size, videos=videos)
    # Nothing is sampled here: what does not fit is an error now.
    continue_clip(generator, tokenizer, frames[None], frames.shape[1], given=given)
    if total <= frames.shape[1]:
        raise ValueError(f"total_frames is {total}, but {frames.shape[1]} frames are given: ask for more than these")

    def write(first: int, rows: int) -> LongClip:
        same = frames[None].expand(rows, -1, -1, -1, -1)
        return _continue(generator, tokenizer, same, total, given, seed, first, sampling)

    return _in_batches(write, videos, batch_size)


def last_frames(path: str | Path, count: int, stride: int, height: int, width: int) -> Tensor:
    """Return the last frames of a video file as float32 (3, count, height, width) in [0, 1], cropped as in training.

    stride: every n-th frame counts. Raises VideoError, and ShortVideoError if there are too few of them.
    """
    span = (count - 1) * stride + 1
    kept: deque[np.ndarray] = deque(maxlen=span)
    kept.extend(iter_frames(path))
    if len(kept) < span:
        each = f" at stride {stride} (which reach over {span})" if stride > 1 else ""
        raise ShortVideoError(f"{path}: has {len(kept)} frames, fewer than the {count} given frames{each}", len(kept))
    return frames_to_clip(np.stack(list(islice(kept, 0, None, stride))), height, width)


def _continue(
    generator: LarpGenerator,
    tokenizer: LarpTokenizer,
    frames: Tensor,
    total: int,
    given: int,
    seed: int,
    first_row: int,
    sampling: dict[str, Any],
) -> LongClip:
    def write(window: Tensor, own_seed: int) -> Tensor:
        return generate(generator, generator.frame_condition(window), seed=own_seed, first_row=first_row, **sampling)

    return continue_windows(tokenizer, frames, total, given, seed, write)


@torch.no_grad()
def continue_windows(
    tokenizer: LarpTokenizer,
    frames: Tensor,
    total_frames: int,
    given: int,
    seed: int,
    write: Callable[[Tensor, int], Tensor],
) -> LongClip:
    """Let videos go on window by window, whatever writes the codes; the frames at hand stay as they are, bit for bit.

    Args:
        frames: float (B, 3, F, H, W) in [0, 1] of the tokenizer's size, at least `given` of them.
        total_frames: how many frames the videos will have.
        given: how many last frames each window goes on from, 1 to T - 1.
        seed: of the whole videos; each window has one of its own.
        write: codes int64 (B, N) of the given frames, filled up to a clip, and the window's seed -> codes (B, N).

    Raises ValueError for numbers, shapes and ranges that do not fit.
    """
    _check_given(given, tokenizer)
    if frames.ndim != 5 or frames.shape[2] < given:
        raise ValueError(f"frames are {tuple(frames.shape)}: (B, 3, F, H, W) with at least the {given} given frames")
    if total_frames < frames.shape[2]:
        raise ValueError(f"total_frames is {total_frames}, but {frames.shape[2]} frames are there already")
    tokenizer.check_clip(_padded(tokenizer, frames[:, :, -given:]))
    frames = frames.detach().float().cpu()
    known, pieces, seams = frames[:, :, -given:], [frames], []
    count = frames.shape[2]
    while count < total_frames:
        window = _encode(tokenizer, _padded(tokenizer, known))
        # Mixed, so that a window does not sample what the next seed samples.
        codes = write(window, seed + count * 0xBF58476D1CE4E5B9)
        clip = _decode(tokenizer, codes)
        seams.append(psnr(known, clip[:, :, :given]))
        pieces.append(clip[:, :, given:])
        count += pieces[-1].shape[2]
        known = torch.cat([known, pieces[-1]], dim=2)[:, :, -given:]
    written = torch.cat(pieces, dim=2)[:, :, :total_frames]
    return LongClip(written, torch.stack(seams, dim=1) if seams else torch.empty(len(frames), 0))


def _padded(tokenizer: LarpTokenizer, known: Tensor) -> Tensor:
    """Given frames (B, 3, G, H, W) as clips (B, 3, T, H, W), filled up as in training."""
    given = known.shape[2]
    return repeat_last(F.pad(known, (0, 0, 0, 0, 0, tokenizer.config.num_frames - given)), given)


# The tokenizer works on one clip at a time: in a batch it rounds otherwise, and a code may then be another one. Beside
# the sampling its time does not count.


def _encode(tokenizer: LarpTokenizer, clips: Tensor) -> Tensor:
    return torch.cat([tokenizer.encode(clip) for clip in clips.split(1)])


def _decode(tokenizer: LarpTokenizer, codes: Tensor) -> Tensor:
    return torch.cat([tokenizer.decode(row).cpu() for row in codes.split(1)])


def _in_batches(write: Callable[[int, int], LongClip], videos: int, batch_size: int) -> Iterator[LongClip]:
    for first in range(0, videos, batch_size):
        yield write(first, min(batch_size, videos - first))


def _check_models(generator: LarpGenerator, tokenizer: LarpTokenizer, task: Task) -> None:
    if generator.config.task != task:
        raise ValueError(
            f"this generator was trained with --task {generator.config.task}; what is asked of it needs one of --task"
            f" {task}"
        )
    generator.check_tokenizer(tokenizer.num_tokens, tokenizer.codebook_size, tokenizer.weight_hash())


def _check_given(given: int, tokenizer: LarpTokenizer) -> None:
    length = tokenizer.config.num_frames
    if not 1 <= given < length:
        raise ValueError(f"given is {given}; it must be 1 to {length - 1}, because clips have {length} frames")


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; it must be at least 1")
