"""A folder of sampled videos: one numbered file each, and one contact sheet of all."""

import re
from pathlib import Path

from larp.data.clips import contact_sheet
from larp.data.video import movies_are_written, write_video

import numpy as np

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
