"""Videos from the generators: clips of classes, continuations of given frames, and videos longer than one clip.

A longer video is sampled window by window. The last frames so far are the given frames of the next window, encoded as in the
training of frame prediction. Only the new frames of a window are used, so existing frames never change. The model's version of the
given frames is compared with them (`LongClip.seam_psnr`) and discarded.

Shapes: B videos, F frames of a video, T frames of the tokenizer's clips, G given frames, H, W pixels.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from larp.config import check_count
from larp.data.clips import frames_to_clip
from larp.data.extraction import repeat_last
from larp.data.video import ShortVideoError, iter_frames
from larp.models.generator import LarpGenerator, Task
from larp.models.losses import psnr
from larp.models.tokenizer import LarpTokenizer
from larp.sampling.options import GuidedSampling
from larp.sampling.sample import generate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GIVEN = 5
"""Given frames of LARP's frame prediction on Kinetics-600."""


@dataclass(frozen=True, eq=False)
class LongClip:
    """Videos sampled window by window."""

    frames: Tensor
    """float32 (B, 3, F, H, W) in [0, 1], on the CPU."""
    seam_psnr: Tensor
    """float32 (B, windows): PSNR in dB between the given frames of each window and the model's version of them. Windows
    without given frames do not count."""


@torch.no_grad()
def continue_clip(
    generator: LarpGenerator,
    tokenizer: LarpTokenizer,
    frames: Tensor,
    total_frames: int,
    *,
    sampling: GuidedSampling = GuidedSampling(),
    given: int = GIVEN,
    seed: int = 0,
    first_row: int = 0,
    **options: Any,
) -> LongClip:
    """Continue videos to `total_frames` frames; the existing frames are returned bit for bit.

    Args:
        generator: for frame prediction; may be on another device than the tokenizer.
        frames: float (B, 3, F, H, W) in [0, 1] of the tokenizer's size, F >= `given`.
        sampling: as in `larp.sampling.sample.generate`.
        given: G, number of last frames that each window continues, 1 to T - 1; best as in training.
        seed, first_row: video i uses the random numbers of (seed, first_row + i), other ones in each window. Continuing
            twice by whole windows gives the same video as continuing once.
        options: weights, dtype and progress of `larp.sampling.sample.generate`.

    Raises ValueError for a generator of another task or tokenizer, and for frames or numbers out of range.
    """
    _check_models(generator, tokenizer, "frame-prediction")
    return _continue(generator, tokenizer, frames, total_frames, given, seed, first_row, sampling, options)


def sample_classes(
    generator: LarpGenerator,
    tokenizer: LarpTokenizer,
    labels: Tensor,
    total_frames: int | None = None,
    *,
    continuation: LarpGenerator | None = None,
    sampling: GuidedSampling = GuidedSampling(),
    given: int = GIVEN,
    seed: int = 0,
    batch_size: int = 8,
    **options: Any,
) -> Iterator[LongClip]:
    """Sample one video for each class label int64 (n,), in batches of at most `batch_size`, which does not change them.

    Args:
        generator: for classes.
        labels: see `LarpGenerator.class_labels`.
        total_frames: F, by default T. A shorter clip is cut; a longer one needs a `continuation`.
        continuation: a frame-prediction generator of the same tokenizer, which samples all windows but the first. The same
            guidance applies if it has `null_condition`, else none.
        sampling, given, seed, options: as in `continue_clip`.

    Raises ValueError, when called, for unsuitable models and numbers out of range.
    """
    length = tokenizer.config.num_frames
    total = length if total_frames is None else total_frames
    _check_models(generator, tokenizer, "class")
    check_count("batch_size", batch_size)
    check_count("total_frames", total)
    if not len(labels):
        raise ValueError("there are no class labels: give at least one")
    if total > length and continuation is None:
        raise ValueError(
            f"{total} frames are more than the {length} of one clip, and a generator for classes samples no more: give a"
            " generator for frame prediction that continues it (continuation; --continue-with RUN)"
        )
    if continuation is not None:
        _check_models(continuation, tokenizer, "frame-prediction")
        _check_given(given, tokenizer)

    def sample(first: int, rows: int) -> LongClip:
        condition = labels[first : first + rows]
        codes = generate(generator, condition, sampling, seed=seed, first_row=first, **options)
        clip = _decode(tokenizer, codes)[:, :, :total]
        if total <= length:
            return LongClip(clip, torch.empty(len(clip), 0))
        guided = continuation.config.null_condition
        own = sampling if guided else replace(sampling, guidance_scale=1.0, guidance_final=None)
        return _continue(continuation, tokenizer, clip, total, given, seed, first, own, options)

    return _in_batches(sample, len(labels), batch_size)


def sample_continuations(
    generator: LarpGenerator,
    tokenizer: LarpTokenizer,
    frames: Tensor,
    videos: int,
    total_frames: int | None = None,
    *,
    sampling: GuidedSampling = GuidedSampling(),
    given: int = GIVEN,
    seed: int = 0,
    batch_size: int = 8,
    **options: Any,
) -> Iterator[LongClip]:
    """Sample `videos` continuations of one video, float (3, F, H, W), in batches of at most `batch_size`.

    `total_frames` counts the existing frames, too; by default one window is added, F + T - `given`. The other arguments and the
    errors, raised when called, are those of `continue_clip`.
    """
    total = frames.shape[1] + tokenizer.config.num_frames - given if total_frames is None else total_frames
    check_count("batch_size", batch_size)
    check_count("videos", videos)
    # Checks the arguments; with the existing number of frames nothing is sampled.
    continue_clip(generator, tokenizer, frames[None], frames.shape[1], given=given)
    if total <= frames.shape[1]:
        raise ValueError(f"total_frames is {total}, but {frames.shape[1]} frames are given: ask for more than these")

    def sample(first: int, rows: int) -> LongClip:
        same = frames[None].expand(rows, -1, -1, -1, -1)
        return _continue(generator, tokenizer, same, total, given, seed, first, sampling, options)

    return _in_batches(sample, videos, batch_size)


def last_frames(path: str | Path, count: int, stride: int, height: int, width: int) -> Tensor:
    """Return the last frames of a video file, `stride` apart, as float32 (3, count, height, width) in [0, 1].

    Frames are resized and cropped as in training. Raises VideoError, and ShortVideoError for too few frames.
    """
    span = (count - 1) * stride + 1
    last: deque[np.ndarray] = deque(maxlen=span)
    last.extend(iter_frames(path))
    if len(last) < span:
        strided = f" at stride {stride} (which span {span})" if stride > 1 else ""
        raise ShortVideoError(
            f"{path}: has {len(last)} frames, fewer than the {count} given frames{strided}", len(last)
        )
    return frames_to_clip(np.stack(list(islice(last, 0, None, stride))), height, width)


def _continue(
    generator: LarpGenerator,
    tokenizer: LarpTokenizer,
    frames: Tensor,
    total: int,
    given: int,
    seed: int,
    first_row: int,
    sampling: GuidedSampling,
    options: dict[str, Any],
) -> LongClip:
    def sample(codes: Tensor, window_seed: int) -> Tensor:
        condition = generator.frame_condition(codes)
        return generate(generator, condition, sampling, seed=window_seed, first_row=first_row, **options)

    return continue_windows(tokenizer, frames, total, given, seed, sample)


@torch.no_grad()
def continue_windows(
    tokenizer: LarpTokenizer,
    frames: Tensor,
    total_frames: int,
    given: int,
    seed: int,
    sample: Callable[[Tensor, int], Tensor],
) -> LongClip:
    """Continue videos window by window with any model; the existing frames are returned bit for bit.

    Args:
        frames: float (B, 3, F, H, W) in [0, 1] of the tokenizer's size, F >= `given`.
        total_frames: number of frames of the result.
        given: number of last frames that each window continues, 1 to T - 1.
        seed: of the videos; each window derives its own.
        sample: maps codes int64 (B, N) of the given frames, padded to a clip, and the window's seed to codes (B, N).

    Raises ValueError for numbers, shapes and values out of range.
    """
    _check_given(given, tokenizer)
    if frames.ndim != 5 or frames.shape[2] < given:
        raise ValueError(
            f"frames are {tuple(frames.shape)}; give (B, 3, F, H, W) with at least the {given} given frames"
        )
    if total_frames < frames.shape[2]:
        raise ValueError(
            f"total_frames is {total_frames}, but there are {frames.shape[2]} frames already: ask for more"
        )
    tokenizer.check_clip(_pad_to_clip(tokenizer, frames[:, :, -given:]))
    frames = frames.detach().float().cpu()
    last, pieces, seams = frames[:, :, -given:], [frames], []
    count = frames.shape[2]
    while count < total_frames:
        condition = _encode(tokenizer, _pad_to_clip(tokenizer, last))
        # Mixed, so that no window uses the random numbers of another seed.
        codes = sample(condition, seed + count * 0xBF58476D1CE4E5B9)
        clip = _decode(tokenizer, codes)
        seams.append(psnr(last, clip[:, :, :given]))
        pieces.append(clip[:, :, given:])
        count += pieces[-1].shape[2]
        last = torch.cat([last, pieces[-1]], dim=2)[:, :, -given:]
    video = torch.cat(pieces, dim=2)[:, :, :total_frames]
    return LongClip(video, torch.stack(seams, dim=1) if seams else torch.empty(len(frames), 0))


def _pad_to_clip(tokenizer: LarpTokenizer, frames: Tensor) -> Tensor:
    """Pad given frames (B, 3, G, H, W) to clips (B, 3, T, H, W) by repeating the last one, as in training."""
    given = frames.shape[2]
    return repeat_last(F.pad(frames, (0, 0, 0, 0, 0, tokenizer.config.num_frames - given)), given)


# The tokenizer runs on one clip at a time: batches round differently, which can change a code. Its time is negligible beside
# the sampling.


def _encode(tokenizer: LarpTokenizer, clips: Tensor) -> Tensor:
    return torch.cat([tokenizer.encode(clip) for clip in clips.split(1)])


def _decode(tokenizer: LarpTokenizer, codes: Tensor) -> Tensor:
    return torch.cat([tokenizer.decode(row).cpu() for row in codes.split(1)])


def _in_batches(sample: Callable[[int, int], LongClip], videos: int, batch_size: int) -> Iterator[LongClip]:
    for first in range(0, videos, batch_size):
        yield sample(first, min(batch_size, videos - first))


def _check_models(generator: LarpGenerator, tokenizer: LarpTokenizer, task: Task) -> None:
    if generator.config.task != task:
        raise ValueError(
            f"this generator was trained with --task {generator.config.task}: give one that was trained with --task {task}"
        )
    generator.check_tokenizer(tokenizer.num_tokens, tokenizer.codebook_size, tokenizer.weight_hash())


def _check_given(given: int, tokenizer: LarpTokenizer) -> None:
    length = tokenizer.config.num_frames
    if not 1 <= given < length:
        raise ValueError(f"given is {given}; it must be 1 to {length - 1}, because clips have {length} frames")
