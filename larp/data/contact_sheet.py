"""Pictures of videos for people: contact sheets, originals beside reconstructions, a folder of numbered videos."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from larp.data.caption_line import CaptionLine
from larp.data.video import movies_are_written, write_video
from larp.files import replacing

import numpy as np

SHEET = "sheet.png"
"""Name of the contact sheet of a `Gallery`."""
_COLUMNS = 8
_MAX_SIDE = 8192
"""Largest side of an enlarged video, in pixels."""
_MAX_CELL_WIDTH = 4096
"""Largest width of a frame on a contact sheet, in pixels."""
_MAX_CAPTION_WIDTH = 1024
"""Width in pixels to which captions widen a sheet of narrow rows."""
_GIVEN_COLOUR = "#2f6fdf"
"""Colour of the border of given frames."""


class Gallery:
    """Writes videos to a folder as 000-NAME.mp4, 001-NAME.mp4, ... (not without PyAV), and a contact sheet, sheet.png.

    Files of these names are replaced, others are left alone. Only the frames of the sheet stay in memory.

    Args:
        folder: created with the first video.
        fps: frames per second.
        scale: repeats of each pixel along both sides; by default those that make a video at least 256 pixels high.
    """

    def __init__(self, folder: str | Path, fps: float, scale: int | None = None):
        if scale is not None and scale < 1:
            raise ValueError(f"scale must be at least 1, got {scale}")
        self.folder, self.fps, self.scale = Path(folder), fps, scale
        self.names: list[str] = []
        self.shown: list[np.ndarray] = []

    def add(self, name: str, frames: np.ndarray) -> Path:
        """Write uint8 (T, H, W, 3) frames and return the path of the file that shows them; `name` is their caption."""
        # A file name takes 255 bytes.
        plain = re.sub(r"[^\w.]+", "-", name).strip("-").encode()[:200].decode(errors="ignore")
        path = self.folder / f"{len(self.names):03d}-{plain}.mp4"
        scale = max(1, 256 // frames.shape[1]) if self.scale is None else self.scale
        check_scale(scale, *frames.shape[1:3])
        if movies_are_written():
            write_video(path, frames.repeat(scale, axis=1).repeat(scale, axis=2), self.fps)
        else:
            path = self.folder / SHEET
        self.names.append(name)
        evenly_spaced = np.linspace(0, len(frames) - 1, min(_COLUMNS, len(frames))).round().astype(int)
        self.shown.append(frames[evenly_spaced])
        return path

    def write_sheet(self) -> Path:
        """Write the contact sheet, one row per video, and return its path. Raises ValueError without a video."""
        contact_sheet(self.shown, self.names, self.folder / SHEET, columns=_COLUMNS)
        return self.folder / SHEET


def check_scale(scale: int, height: int, width: int) -> None:
    """Raise ValueError unless a video of height x width pixels can be written with each pixel repeated `scale` times."""
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    if scale * max(height, width) > _MAX_SIDE:
        raise ValueError(
            f"scale is {scale}: pictures of {scale * width} x {scale * height} pixels; at most {_MAX_SIDE} a side can be"
            f" written, so choose a scale up to {max(1, _MAX_SIDE // max(height, width))}"
        )


def contact_sheet(
    videos: Sequence[np.ndarray],
    captions: Sequence[str],
    path: str | Path,
    columns: int = 8,
    cell: int = 80,
    given: int = 0,
) -> None:
    """Write a PNG with one row per video: its caption above `columns` evenly spaced frames.

    The file is replaced atomically.

    Args:
        videos: uint8 (T, H, W, 3).
        captions: one for each video, see `CaptionLine`; cut where they are wider than the sheet.
        path: of the PNG; missing folders are created.
        columns: frames per video.
        cell: height of a frame in pixels. Smaller frames are enlarged by whole factors up to it (nearest neighbour),
            larger ones are shrunk to it; very wide ones become lower.
        given: number of leading frames that the other frames were predicted from. They get a blue border, and half of
            the columns show predicted frames, as far as there are enough.

    Raises ValueError if the numbers of captions and videos differ or are 0, OSError that names the file if it cannot
    be written.
    """
    from PIL import Image, ImageDraw

    if len(videos) != len(captions) or not len(videos):
        raise ValueError(
            f"{len(videos)} videos and {len(captions)} captions; need one caption for each video, at least 1"
        )
    gap = max(3, cell // 24) if given else 3
    line = 16 + 2 * gap
    rows = [
        [(k < given, _resize_to_cell(video[k], cell)) for k in _shown_frames(len(video), columns, given)]
        for video in videos
    ]
    width = max(sum(picture.width + gap for _, picture in row) for row in rows) + gap
    lines = [CaptionLine(text, max(width, _MAX_CAPTION_WIDTH) - 4 * gap) for text in captions]
    width = max(width, *(caption.width + 4 * gap for caption in lines))
    sheet = Image.new("RGB", (width, sum(row[0][1].height + line + gap for row in rows) + gap), "white")
    canvas, y = ImageDraw.Draw(sheet), 0
    for row, caption in zip(rows, lines, strict=True):
        caption.draw(canvas, 2 * gap, y + gap)
        y, x = y + line, gap
        for bordered, picture in row:
            if bordered:
                corner = x + picture.width + gap - 1, y + picture.height + gap - 1
                canvas.rectangle((x - gap, y - gap, *corner), _GIVEN_COLOUR)
            sheet.paste(picture, (x, y))
            x += picture.width + gap
        y += row[0][1].height + gap
    with replacing(path) as part:
        sheet.save(part, format="PNG")


def side_by_side(
    originals: Sequence[np.ndarray], reconstructions: Sequence[np.ndarray], pairs_per_row: int = 2
) -> np.ndarray:
    """Join uint8 (T, H, W, 3) videos of one shape into one video, each original left of its reconstruction."""
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


def _shown_frames(frames: int, columns: int, given: int) -> list[int]:
    """Return the indices of the frames of a row: evenly spaced among the given frames, and among the others."""

    def evenly_spaced(first: int, count: int, shown: int) -> list[int]:
        return [first + round(k) for k in np.linspace(0, count - 1, min(count, shown))]

    predicted = frames - given
    if not given or predicted <= 0:
        return evenly_spaced(0, frames, columns)
    before = min(given, max(columns // 2, columns - predicted))
    return evenly_spaced(0, given, before) + evenly_spaced(given, predicted, columns - before)


def _resize_to_cell(frame: np.ndarray, cell: int):
    from PIL import Image

    picture = Image.fromarray(frame)
    scale = min(cell / picture.height, _MAX_CELL_WIDTH / picture.width)
    if scale < 1:
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        return picture.resize(size, Image.Resampling.BILINEAR)
    factor = int(scale)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
