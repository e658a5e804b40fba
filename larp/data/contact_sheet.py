"""A folder of sampled videos: one numbered file each, and one contact sheet of all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from larp.data.video import movies_are_written, write_video

import numpy as np

# Pixels: the widest picture of a contact sheet.
_WIDEST = 4096


# Of the pictures of a contact sheet that were given.
_GIVEN = "#2f6fdf"


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


SHEET = "sheet.png"
_COLUMNS = 8
_LARGEST = 8192


def check_scale(scale: int, height: int, width: int) -> None:
    """Raise ValueError unless a video of this size can be written with each pixel repeated so often."""
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    if scale * max(height, width) > _LARGEST:
        raise ValueError(
            f"scale is {scale}: pictures of {scale * width} x {scale * height} pixels; at most {_LARGEST} a side can be"
            f" written, so choose a scale up to {max(1, _LARGEST // max(height, width))}"
        )


class Gallery:
    """Writes videos into a folder as they come: 000-NAME.mp4, 001-NAME.mp4, ... (not without PyAV), and at the end sheet.png.

    Files of these names are replaced, others are left alone. Of each video a few frames are kept in memory, no more.

    Args:
        folder: made when the first video comes.
        fps: frames per second.
        scale: repeat each pixel so often along both sides; by default so that a video is at least 256 high.
    """

    def __init__(self, folder: str | Path, fps: float, scale: int | None = None):
        if scale is not None and scale < 1:
            raise ValueError(f"scale must be at least 1, got {scale}")
        self.folder, self.fps, self.scale = Path(folder), fps, scale
        self.names: list[str] = []
        self.shown: list[np.ndarray] = []

    def add(self, name: str, frames: np.ndarray) -> Path:
        """Write uint8 (T, H, W, 3) frames and return the path of the file that shows them; `name` is the caption on the sheet."""
        plain = re.sub(r"[^\w.]+", "-", name).strip("-")
        path = self.folder / f"{len(self.names):03d}-{plain}.mp4"
        scale = max(1, 256 // frames.shape[1]) if self.scale is None else self.scale
        check_scale(scale, *frames.shape[1:3])
        if movies_are_written():
            write_video(path, frames.repeat(scale, axis=1).repeat(scale, axis=2), self.fps)
        else:
            path = self.folder / SHEET
        self.names.append(name)
        spread = np.linspace(0, len(frames) - 1, min(_COLUMNS, len(frames))).round().astype(int)
        self.shown.append(frames[spread])
        return path

    def write_sheet(self) -> Path:
        """Write the contact sheet, one row for each video, and return its path; ValueError if no video came."""
        contact_sheet(self.shown, self.names, self.folder / SHEET, columns=_COLUMNS)
        return self.folder / SHEET
