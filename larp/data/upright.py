"""Decoded frames as they are shown: turned or mirrored where the file says so, with square pixels."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

from larp.data.open_video import av, open_bytes

import numpy as np

# Beyond this ratio of width to height, or of height to width, a shape of pixels is taken for damage.
_MOST_OBLONG = 10
_UPRIGHT = 1, 0, 0, 1
_EXIF_ORIENTATION = 0x0112
_EXIF = {
    2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1), 5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}  # fmt: skip
# By the angle in degrees, counter-clockwise.
_TURNS = {90: _EXIF[8], 180: _EXIF[3], -180: _EXIF[3], -90: _EXIF[6]}


class Upright:
    """Converts the frames of one opened stream to pixels.

    Frames of pixels that are not square get another width, as FFmpeg and players have it. A picture's pixels are square: the
    numbers in it are its resolution on paper, which no viewer applies.

    Orientations are the numbers a, b, c, d of a display matrix: the pixel at (x, y) is shown at (a x + c y, b x + d y), with y
    downwards.
    """

    def __init__(self, path: str | Path, container, stream):
        self._picture = container.format.name.endswith("_pipe")
        shape = Fraction(1) if self._picture else Fraction(stream.sample_aspect_ratio or 1)
        self.shape = shape if Fraction(1, _MOST_OBLONG) <= shape <= _MOST_OBLONG else Fraction(1)
        """Width of a pixel relative to its height."""
        self._exif = _exif_orientation(path) if self._picture else None
        # Kept, since its set-up costs more than converting a small frame.
        self._convert = av.video.reformatter.VideoReformatter()

    def size(self, frame) -> tuple[int, int]:
        """Return the height and width in which a frame of PyAV is shown."""
        height, width = frame.height, self._width(frame)
        return (width, height) if _turned(self._orientation(frame)) else (height, width)

    def pixels(self, frame) -> np.ndarray:
        """Return a frame of PyAV as it is shown, uint8 (H, W, 3) RGB."""
        pixels = self._convert.reformat(frame, width=self._width(frame), format="rgb24").to_ndarray()
        a, b, c, d = orientation = self._orientation(frame)
        if _turned(orientation):
            pixels, a, d = pixels.transpose(1, 0, 2), c, b
        return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])

    def _width(self, frame) -> int:
        return max(1, round(frame.width * self.shape))

    def _orientation(self, frame) -> tuple[int, int, int, int]:
        if self._exif is not None:
            return self._exif
        try:
            matrix = frame.side_data.get("DISPLAYMATRIX")
        except ValueError:  # beside it are data of a kind that PyAV does not know, and then it gives none
            return _TURNS.get(round(frame.rotation / 90) * 90, _UPRIGHT)
        if matrix is None:
            return _UPRIGHT
        a, b, _, c, d = struct.unpack_from("=5i", bytes(matrix))
        return a, b, c, d


def _exif_orientation(path: str | Path) -> tuple[int, int, int, int]:
    """Return the orientation that a camera noted in a picture; upright if there is none, or none that can be read."""
    from PIL import Image

    try:
        with open_bytes(path) as file, Image.open(file) as picture:
            return _EXIF.get(picture.getexif().get(_EXIF_ORIENTATION), _UPRIGHT)
    except Exception:  # FFmpeg decodes the picture; in damaged ones Pillow stumbles over many things
        return _UPRIGHT


def _turned(orientation: tuple[int, int, int, int]) -> bool:
    """Whether rows of a frame are shown as columns."""
    return abs(orientation[1]) > abs(orientation[0])
