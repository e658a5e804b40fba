"""Resizing frames of any size to a tokenizer's frame size and back: crop, stretch or pad.

Frames are uint8 (T, H, W, 3).
"""

from dataclasses import dataclass
from typing import Literal, get_args

from larp.data.clips import resize_frames, scale_frames
from larp.data.open_video import MAX_PIXELS

import numpy as np

Fit = Literal["crop", "stretch", "pad"]
FITS = get_args(Fit)
Size = tuple[int, int]


@dataclass(frozen=True)
class Fitting:
    """A mapping between frames of a source size and of the tokenizer's frame size.

    crop: resize to cover the frame, then crop the centre, as in training. stretch: resize without preserving the aspect ratio.
    pad: resize to fit into the frame, with black bars around. Raises ValueError for an unknown fit or an invalid size.
    """

    fit: Fit
    source: Size
    """Height and width of the source frames."""
    frame: Size
    """Height and width of the tokenizer's frame."""

    def __post_init__(self):
        if self.fit not in FITS:
            raise ValueError(f"fit must be one of {', '.join(FITS)}, not {self.fit!r}")
        for name, size in (("source", self.source), ("frame", self.frame)):
            if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
                raise ValueError(f"{name}: {size[1]}x{size[0]} pixels are not between 1 and {MAX_PIXELS}")

    @property
    def picture(self) -> tuple[int, int, int, int]:
        """Top, left, height and width of the frame without the bars of `pad`."""
        (height, width), (old_height, old_width) = self.frame, self.source
        if self.fit != "pad":
            return 0, 0, height, width
        scale = min(height / old_height, width / old_width)
        new = max(1, min(height, round(old_height * scale))), max(1, min(width, round(old_width * scale)))
        return (height - new[0]) // 2, (width - new[1]) // 2, *new

    @property
    def region(self) -> tuple[slice, slice]:
        """Slices of the rows and columns of the frame without the bars of `pad`."""
        top, left, height, width = self.picture
        return slice(top, top + height), slice(left, left + width)

    @property
    def visible_size(self) -> Size:
        """Height and width, in source pixels, of the part of the source that the frame shows."""
        if self.fit != "crop":
            return self.source
        scale = max(new / old for new, old in zip(self.frame, self.source, strict=True))
        height, width = (max(1, min(old, round(new / scale))) for new, old in zip(self.frame, self.source, strict=True))
        return height, width

    def apply(self, frames: np.ndarray) -> np.ndarray:
        """Resize frames of the source size to the tokenizer's frame size."""
        if self.fit == "crop":
            return resize_frames(frames, *self.frame)
        top, left, height, width = self.picture
        bars = (top, self.frame[0] - top - height), (left, self.frame[1] - left - width)
        return np.pad(scale_frames(frames, height, width), ((0, 0), *bars, (0, 0)))

    def undo(self, frames: np.ndarray) -> np.ndarray:
        """Resize frames of the tokenizer's frame size to `visible_size`, without bars. Cropped edges are not restored."""
        return scale_frames(frames[..., *self.region, :], *self.visible_size)
