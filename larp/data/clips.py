"""Frames <-> clips: which frames, resize, centre crop, and the pictures that show a person what came out.

A clip is float32 (3, T, H, W) in [0, 1]. Resizing ends on 8-bit values, so a clip kept in memory as uint8 is the clip
itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

_CHUNK = 32


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

    See `scale_frames`; the aspect ratio is kept.
    """
    old_height, old_width = frames.shape[1:3]
    scale = max(height / old_height, width / old_width)
    new = max(height, round(old_height * scale)), max(width, round(old_width * scale))
    top, left = (new[0] - height) // 2, (new[1] - width) // 2
    return np.ascontiguousarray(scale_frames(frames, *new)[:, top : top + height, left : left + width])


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
    videos: Sequence[np.ndarray], captions: Sequence[str], path: str | Path, columns: int = 8, cell: int = 80
) -> None:
    """Write a PNG with one row for each uint8 (T, H, W, 3) video: its caption above `columns` evenly spaced frames.

    Frames are enlarged by whole factors (nearest neighbour) up to `cell` pixels high, or shrunk to it. The file is
    replaced in one step. ValueError if captions and videos do not pair up.
    """
    from PIL import Image, ImageDraw, ImageFont

    if len(videos) != len(captions) or not len(videos):
        raise ValueError(
            f"{len(videos)} videos and {len(captions)} captions; need one caption for each video, at least 1"
        )
    font, line, gap = ImageFont.load_default(size=14), 22, 3
    rows = [[_enlarge(video[k], cell) for k in _spread(len(video), columns)] for video in videos]
    width = max(sum(p.width + gap for p in row) for row in rows) + gap
    width = max(width, *(int(font.getlength(text)) + 4 * gap for text in captions))
    sheet = Image.new("RGB", (width, sum(row[0].height + line + gap for row in rows) + gap), "white")
    draw, y = ImageDraw.Draw(sheet), 0
    for row, text in zip(rows, captions, strict=True):
        draw.text((2 * gap, y + gap), text, fill="black", font=font)
        y, x = y + line, gap
        for picture in row:
            sheet.paste(picture, (x, y))
            x += picture.width + gap
        y += row[0].height + gap
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{path.name}")
    sheet.save(temporary, format="PNG")
    temporary.replace(path)


def _spread(frames: int, columns: int) -> list[int]:
    return [round(k) for k in np.linspace(0, frames - 1, min(columns, frames))]


def _enlarge(frame: np.ndarray, cell: int):
    from PIL import Image

    picture = Image.fromarray(frame)
    if picture.height > cell:
        return picture.resize((max(1, round(picture.width * cell / picture.height)), cell), Image.Resampling.BILINEAR)
    factor = cell // picture.height
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
