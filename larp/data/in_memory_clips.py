"""Augmented training clips, cut from videos that are held in device memory.

Shapes: b clips of a micro batch, T frames, H x W pixels of a clip.
"""

from __future__ import annotations

from collections.abc import Iterator

from larp.data.clips import ClipShape
from larp.data.datasets import VideoSet
from larp.data.loader import ClipLoader, video_labels

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Height and width of the stored frames relative to a clip's; crops range from the clip's size to the whole frame.
_MARGIN = 21 / 16
# Number of crop sizes; all clips of one size are resized in one call.
_CROP_SIZES = 6
_WHOLE_FRAME_SHARE = 0.25
_BRIGHTNESS = 0.1
_MAX_STRIDE = 3
_MAX_MEMORY_GB = 64.0
_REVERSED_SHARE = 0.25
NUM_RANDOM = 11
"""Random numbers per clip: speed, start, whole frame, side, top, left, mirrored, reversed, and a gain of each colour."""
_AUGMENT = 4  # random stream of the augmentation, separate from those of the loader


class ResidentClips(ClipLoader):
    """A `ClipLoader` with augmentation: all videos are decoded once and stored as uint8 on `device`.

    A clip is a random window with stride 1, 2 or 3, as far as the video is long enough, and a random crop of 0.76 to 1 of
    the frame's sides, resized as in `larp.data.clips`. One clip in four shows the whole frame, with `reverse` one in four is
    reversed in time, and with `flip` half are mirrored. Each colour channel is scaled by 0.9 to 1.1. The clip at a global position
    is a function of the seed and that position only.

    Batches equal those of `ClipLoader`, with the clips on the device. Raises ValueError if the videos need more than 64
    GiB.
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
        *,
        flip: bool = False,
        reverse: bool = True,
        device: torch.device | str = "cpu",
    ):
        self.out, self.reverse = shape, reverse
        stored = ClipShape(shape.frames, round(shape.height * _MARGIN), round(shape.width * _MARGIN), shape.stride)
        super().__init__(
            videos, stored, global_batch, micro_batch, seed, rank, world_size, flip=flip, in_memory=True,
            memory_gb=_MAX_MEMORY_GB,
        )  # fmt: skip
        memory = self._source.take_memory()
        if memory is None:
            raise ValueError(
                f"{videos.spec}: crop keeps all videos in memory, and they need more than {_MAX_MEMORY_GB:.0f} GiB: "
                "train without --crop, or on fewer videos"
            )
        self.usable = sorted(memory)
        lengths = [len(memory[index]) for index in self.usable]
        self._lengths = np.array(lengths)
        self._offsets = np.cumsum([0, *lengths[:-1]])
        self._frames = torch.empty((sum(lengths), stored.height, stored.width, 3), dtype=torch.uint8, device=device)
        for index, offset, length in zip(self.usable, self._offsets, lengths, strict=True):
            self._frames[offset : offset + length] = torch.from_numpy(memory.pop(index))

    def __iter__(self) -> Iterator[dict]:
        while True:
            step, micro = self.step, self.micro
            first = self.rank_offset + micro * self.micro_batch
            rows = np.arange(first, first + self.micro_batch)
            uniform = np.random.default_rng((self.seed, _AUGMENT, step)).random((self.global_batch, NUM_RANDOM))[rows]
            chosen = np.array([self._index(step * self.global_batch + row) for row in rows])
            batch = video_labels([self.usable[k] for k in chosen], self._source.videos)
            self.step, self.micro = self._after(step, micro)
            yield {"clip": self.cut(chosen, uniform), **batch, "sample_offset": first, "step": step}

    def places(self, chosen: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the first frames and strides, int64 (b,), of the clips that `cut` cuts, and whether they are mirrored, bool (b,)."""
        (speed, start), mirror, shape = uniform.T[:2], uniform[:, 6], self.out
        lengths = self._lengths[chosen]
        limit = np.clip((lengths - 1) // max(1, shape.frames - 1) // shape.stride, 1, _MAX_STRIDE)
        strides = (1 + (speed * limit).astype(np.int64)) * shape.stride
        room = lengths - (shape.frames - 1) * strides
        return (start * room).astype(np.int64), strides, (mirror < 0.5) & self.flip

    def _identity(self) -> dict:
        shape = self.out
        return super()._identity() | {
            "clip_shape": [shape.frames, shape.height, shape.width, shape.stride],
            "crop": True,
        }

    def _count(self) -> int:
        return len(self.usable)

    def _name(self, index: int) -> str:
        return super()._name(self.usable[index])

    def cut(self, chosen: np.ndarray, uniform: np.ndarray) -> Tensor:
        """Cut clips from the videos `chosen` (b,), indices of `usable`, by U[0, 1) values (b, NUM_RANDOM).

        Returns float32 (b, 3, T, H, W) in [0, 1] on the device.
        """
        shape, device = self.out, self._frames.device
        whole, side, top, left, _, backwards = uniform.T[2:8]
        starts, strides, flipped = self.places(chosen, uniform)
        starts = self._offsets[chosen] + starts
        order = np.where(
            self.reverse & (backwards[:, None] < _REVERSED_SHARE),
            np.arange(shape.frames)[::-1],
            np.arange(shape.frames),
        )
        frames = torch.from_numpy(starts[:, None] + strides[:, None] * order).to(device)
        sides = np.where(whole < _WHOLE_FRAME_SHARE, _CROP_SIZES - 1, (side * _CROP_SIZES).astype(np.int64))
        clips = torch.empty((len(chosen), 3, *(shape.frames, shape.height, shape.width)), device=device)
        for k in np.unique(sides):
            rows = np.flatnonzero(sides == k)
            share = k / (_CROP_SIZES - 1)
            height = round(shape.height + share * (self.shape.height - shape.height))
            width = round(shape.width + share * (self.shape.width - shape.width))
            ys = (top[rows] * (self.shape.height - height + 1)).astype(np.int64)[:, None] + np.arange(height)
            xs = (left[rows] * (self.shape.width - width + 1)).astype(np.int64)[:, None] + np.arange(width)
            ys, xs = torch.from_numpy(ys).to(device), torch.from_numpy(xs).to(device)
            part = self._frames[frames[rows][:, :, None, None], ys[:, None, :, None], xs[:, None, None, :]]
            images = part.flatten(0, 1).permute(0, 3, 1, 2).float()
            if images.shape[-2:] != (shape.height, shape.width):
                size = shape.height, shape.width
                images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
            clips[torch.from_numpy(rows).to(device)] = images.unflatten(0, (len(rows), -1)).transpose(1, 2) / 255
        gains = 1 + _BRIGHTNESS * (2 * uniform[:, 8:] - 1)
        clips *= torch.from_numpy(gains.astype(np.float32)).to(device)[:, :, None, None, None]
        if self.flip:
            mirrored = torch.from_numpy(flipped).to(device)[:, None, None, None, None]
            clips = torch.where(mirrored, clips.flip(-1), clips)
        return clips.clamp_(0, 1)
