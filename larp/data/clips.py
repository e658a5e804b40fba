"""Converts frames to clips and back: frame selection, resizing and centre crop.

Frames are uint8 (T, H, W, 3); a clip is float32 (3, T, H, W) in [0, 1]. Resizing rounds to 8 bits, so that storing the
resized frames as uint8 loses nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

_CHUNK = 32
# A resized side may exceed the crop by this factor; more elongated frames are cropped while they are resized.
_MAX_ELONGATION = 4


@dataclass(frozen=True)
class ClipShape:
    """The shape of a clip: `frames` frames of height x width pixels, taken every `stride` frames of the file."""

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
        """Number of frames of the file from the first to the last frame of a clip."""
        return (self.frames - 1) * self.stride + 1


def choose_start(frames: int, shape: ClipShape, u: float | None = None) -> int:
    """Return the first frame of a clip in a video of `frames` frames: uniform for u in [0, 1), centred for u=None.

    Raises ValueError if the video is too short; the message serves as the reason for skipping it.
    """
    room = frames - shape.span
    if room < 0:
        stride = f" at stride {shape.stride}" if shape.stride > 1 else ""
        raise ValueError(f"has {frames} frames, the clip needs {shape.span}{stride}")
    return room // 2 if u is None else min(int(u * (room + 1)), room)


def scale_frames(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 (T, H, W, 3) frames to height x width, ignoring the aspect ratio; returns uint8.

    Bilinear with antialiasing, computed in float32 and rounded to 8 bits.
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
    """Resize uint8 (T, H, W, 3) frames to cover height x width at their aspect ratio, and crop the centre.

    Returns uint8. Resizing is that of `scale_frames`. Memory and time are bounded for any aspect ratio.
    """
    old_height, old_width = frames.shape[1:3]
    scale = max(height / old_height, width / old_width)
    new = max(height, round(old_height * scale)), max(width, round(old_width * scale))
    if new[1] > _MAX_ELONGATION * width:
        return _resize_wide(frames, height, width, new[1])
    if new[0] > _MAX_ELONGATION * height:
        turned = _resize_wide(frames.transpose(0, 2, 1, 3), width, height, new[0])
        return np.ascontiguousarray(turned.transpose(0, 2, 1, 3))
    top, left = (new[0] - height) // 2, (new[1] - width) // 2
    return np.ascontiguousarray(scale_frames(frames, *new)[:, top : top + height, left : left + width])


def _resize_wide(frames: np.ndarray, height: int, width: int, whole: int) -> np.ndarray:
    """Return the middle `width` columns of frames resized to height x `whole`, computing only these columns.

    Along the width this is the filter of F.interpolate: a triangle whose half-width is a pixel of the coarser grid.
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
    """Convert uint8 (T, H, W, 3) frames to a clip, float32 (3, T, H, W) in [0, 1], without resizing."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).float().div_(255).contiguous()


def frames_to_clip(frames: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Convert uint8 (T, H, W, 3) frames to a clip, float32 (3, T, height, width) in [0, 1], by `resize_frames`."""
    return pixels_to_clip(resize_frames(frames, height, width))


def clip_to_frames(clip: torch.Tensor) -> np.ndarray:
    """Convert a clip, float (3, T, H, W), to uint8 (T, H, W, 3) frames; values outside [0, 1] are clamped."""
    if clip.ndim != 4 or clip.shape[0] != 3:
        raise ValueError(f"a clip is (3, T, H, W), not {tuple(clip.shape)}")
    pixels = clip.detach().float().clamp(0, 1).mul(255).round().byte()
    return pixels.permute(1, 2, 3, 0).contiguous().cpu().numpy()
