"""Frames <-> clips: which frames, resize, centre crop, and the pictures that show a person what came out.

A clip is float32 (3, T, H, W) in [0, 1]. Resizing ends on 8-bit values, so a clip kept in memory as uint8 is the clip
itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

_CHUNK = 32
# How many times longer than the frame a picture may become before the crop; ones wider still are cropped first.
_MOST_LONG = 4


@dataclass(frozen=True)
class ClipShape:
    """The shape of a clip: `frames` frames of height x width pixels, every `stride`-th frame of the file."""

    frames: int
    height: int
    width: int
    stride: int = 1

    def __post_init__(self):
        for name in ("frames", "height", "width", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"ClipShape.{name}={getattr(self, name)} must be at least 1")

    @property
    def span(self) -> int:
        """How many frames of the file a clip reaches over, first to last."""
        return (self.frames - 1) * self.stride + 1


def choose_start(frames: int, shape: ClipShape, u: float | None = None) -> int:
    """Return the first frame of a clip in a video of `frames` frames: uniform for u in [0, 1), the centre for u=None.

    Raises ValueError if the video is too short; the message reads as the reason for skipping it.
    """
    room = frames - shape.span
    if room < 0:
        stride = f" at stride {shape.stride}" if shape.stride > 1 else ""
        raise ValueError(f"has {frames} frames, the clip needs {shape.span}{stride}")
    return room // 2 if u is None else min(int(u * (room + 1)), room)


def scale_frames(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 (T, H, W, 3) frames to height x width, whatever their aspect ratio; uint8 in and out.

    Bilinear and antialiased, computed in float32, rounded to 8 bits at the end.
    """
    if frames.shape[1:3] == (height, width):
        return np.ascontiguousarray(frames)
    parts = []
    for first in range(0, len(frames), _CHUNK):
        part = torch.from_numpy(np.ascontiguousarray(frames[first : first + _CHUNK])).permute(0, 3, 1, 2).float()
        part = F.interpolate(part, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
        parts.append(part.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy())
    return np.concatenate(parts)


def resize_frames(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 (T, H, W, 3) frames so that they just cover height x width, then crop the centre; uint8 in and out.

    See `scale_frames`; the aspect ratio is kept. Memory and time are bounded whatever it is.
    """
    old_height, old_width = frames.shape[1:3]
    scale = max(height / old_height, width / old_width)
    new = max(height, round(old_height * scale)), max(width, round(old_width * scale))
    if new[1] > _MOST_LONG * width:
        return _resize_wide(frames, height, width, new[1])
    if new[0] > _MOST_LONG * height:
        turned = _resize_wide(frames.transpose(0, 2, 1, 3), width, height, new[0])
        return np.ascontiguousarray(turned.transpose(0, 2, 1, 3))
    top, left = (new[0] - height) // 2, (new[1] - width) // 2
    return np.ascontiguousarray(scale_frames(frames, *new)[:, top : top + height, left : left + width])


def _resize_wide(frames: np.ndarray, height: int, width: int, whole: int) -> np.ndarray:
    """The middle `width` columns of frames resized to height x whole, from no more columns than these are made of.

    The filter is F.interpolate's, written out along the width: a triangle as wide as a pixel of the coarser grid.
    """
    ratio = frames.shape[2] / whole
    reach = max(1.0, ratio)
    centres = ((whole - width) // 2 + np.arange(width) + 0.5) * ratio
    first, end = max(0, int(centres[0] - reach)), min(frames.shape[2], math.ceil(centres[-1] + reach))
    columns = np.arange(first, end) + 0.5
    weights = np.clip(1 - np.abs(columns - centres[:, None]) / reach, 0, None)
    weights = torch.from_numpy(weights / weights.sum(1, keepdims=True)).float()
    parts = []
    for begin in range(0, len(frames), _CHUNK):
        part = torch.from_numpy(np.ascontiguousarray(frames[begin : begin + _CHUNK, :, first:end]))
        size = height, end - first
        part = F.interpolate(
            part.permute(0, 3, 1, 2).float(), size=size, mode="bilinear", antialias=True, align_corners=False
        )
        parts.append((part @ weights.T).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy())
    return np.concatenate(parts)


def pixels_to_clip(frames: np.ndarray) -> torch.Tensor:
    """Turn uint8 (T, H, W, 3) frames into a clip, float32 (3, T, H, W) in [0, 1], without resizing."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).float().div_(255).contiguous()


def frames_to_clip(frames: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Turn uint8 (T, H, W, 3) frames into a clip, float32 (3, T, height, width) in [0, 1]; see `resize_frames`."""
    return pixels_to_clip(resize_frames(frames, height, width))


def clip_to_frames(clip: torch.Tensor) -> np.ndarray:
    """Turn a clip, float (3, T, H, W), into uint8 (T, H, W, 3) frames; values outside [0, 1] are clamped."""
    if clip.ndim != 4 or clip.shape[0] != 3:
        raise ValueError(f"a clip is (3, T, H, W), not {tuple(clip.shape)}")
    pixels = clip.detach().float().clamp(0, 1).mul(255).round().byte()
    return pixels.permute(1, 2, 3, 0).contiguous().cpu().numpy()
