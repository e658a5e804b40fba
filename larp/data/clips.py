"""Frames <-> clips: which frames, resize, centre crop, and the pictures that show a person what came out.

A clip is float32 (3, T, H, W) in [0, 1]. Resizing ends on 8-bit values, so a clip kept in memory as uint8 is the clip
itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

_CHUNK = 32
# How many times longer than the frame a picture may become before the crop; ones wider still are cropped first.
_MOST_LONG = 4
# Pixels: the widest picture of a contact sheet.
_WIDEST = 4096
# Of the pictures of a contact sheet that were given.
_GIVEN = "#2f6fdf"


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


def side_by_side(
    originals: Sequence[np.ndarray], reconstructions: Sequence[np.ndarray], pairs_per_row: int = 2
) -> np.ndarray:
    """Join uint8 (T, H, W, 3) videos of one shape into one, each original left of its reconstruction, pairs in rows."""
    if len(originals) != len(reconstructions) or not len(originals):
        raise ValueError(
            f"{len(originals)} originals and {len(reconstructions)} reconstructions; need the same number, at least 1"
        )
    shapes = {video.shape for video in (*originals, *reconstructions)}
    if len(shapes) > 1:
        raise ValueError(f"all videos must have one shape, not {sorted(shapes)}")
    pairs = [np.concatenate(pair, axis=2) for pair in zip(originals, reconstructions, strict=True)]
    per_row = min(pairs_per_row, len(pairs))
    pairs += [np.zeros_like(pairs[0])] * (-len(pairs) % per_row)
    rows = [np.concatenate(pairs[k : k + per_row], axis=2) for k in range(0, len(pairs), per_row)]
    return np.concatenate(rows, axis=1)


def contact_sheet(
    videos: Sequence[np.ndarray],
    captions: Sequence[str],
    path: str | Path,
    columns: int = 8,
    cell: int = 80,
    given: int = 0,
) -> None:
    """Write a PNG with one row for each uint8 (T, H, W, 3) video: its caption above `columns` evenly spaced frames.

    Frames are enlarged by whole factors (nearest neighbour) up to `cell` pixels high, or shrunk to it; very wide ones
    become lower. If the first `given` frames of each were there before the others were made, these are framed in blue,
    and half of the columns show what was made, as far as there is so much. The file is replaced in one step. ValueError
    if captions and videos do not pair up; OSError that names the file if it cannot be written, and then nothing new is
    there.
    """
    from PIL import Image, ImageDraw, ImageFont

    if len(videos) != len(captions) or not len(videos):
        raise ValueError(
            f"{len(videos)} videos and {len(captions)} captions; need one caption for each video, at least 1"
        )
    font, gap = ImageFont.load_default(size=14), max(3, cell // 24) if given else 3
    line = 16 + 2 * gap
    rows = [[(k < given, _enlarge(video[k], cell)) for k in _spread(len(video), columns, given)] for video in videos]
    width = max(sum(picture.width + gap for _, picture in row) for row in rows) + gap
    width = max(width, *(int(font.getlength(text)) + 4 * gap for text in captions))
    sheet = Image.new("RGB", (width, sum(row[0][1].height + line + gap for row in rows) + gap), "white")
    draw, y = ImageDraw.Draw(sheet), 0
    for row, text in zip(rows, captions, strict=True):
        draw.text((2 * gap, y + gap), text, fill="black", font=font)
        y, x = y + line, gap
        for framed, picture in row:
            if framed:
                draw.rectangle((x - gap, y - gap, x + picture.width + gap - 1, y + picture.height + gap - 1), _GIVEN)
            sheet.paste(picture, (x, y))
            x += picture.width + gap
        y += row[0][1].height + gap
    path = Path(path)
    temporary = path.with_name(f".writing-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(temporary, format="PNG")
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _spread(frames: int, columns: int, given: int) -> list[int]:
    """The frames that a row shows: evenly spaced, apart among the given ones and the others."""

    def evenly(first: int, count: int, shown: int) -> list[int]:
        return [first + round(k) for k in np.linspace(0, count - 1, min(count, shown))]

    made = frames - given
    if not given or made <= 0:
        return evenly(0, frames, columns)
    before = min(given, max(columns // 2, columns - made))
    return evenly(0, given, before) + evenly(given, made, columns - before)


def _enlarge(frame: np.ndarray, cell: int):
    from PIL import Image

    picture = Image.fromarray(frame)
    scale = min(cell / picture.height, _WIDEST / picture.width)
    if scale < 1:
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        return picture.resize(size, Image.Resampling.BILINEAR)
    factor = int(scale)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
