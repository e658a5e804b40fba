"""Video: what generate returns, and whether it could be written to a file."""

import math
from dataclasses import dataclass
from pathlib import Path

from larp_mllm.checks import check_count

import numpy as np

# What libx264 fits into, a GIF, and a contact sheet.
SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp"),
    *(".gif", ".png"),
)


@dataclass(frozen=True, eq=False)
class Video:
    """A generated video: frames uint8 (T, H, W, 3), frames per second, and the prompt and codes it was made from.

    The codes are those of one clip; a video of several windows has none. In a notebook it shows itself. ValueError for
    frames of another shape or dtype, for none, and for a rate that is not finite and above 0.
    """

    frames: np.ndarray
    fps: float
    prompt: str = ""
    codes: tuple[int, ...] = ()

    def __post_init__(self):
        frames = self.frames
        if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            found = f"{frames.dtype} {frames.shape}" if isinstance(frames, np.ndarray) else type(frames).__name__
            raise ValueError(f"frames must be a uint8 array (T, H, W, 3) of 0..255, got {found}: convert it")
        if 0 in frames.shape:
            raise ValueError(f"frames are {frames.shape}: a video has at least one frame of one pixel")
        if not 0 < self.fps < math.inf:
            raise ValueError(f"fps is {self.fps}; it must be a finite number above 0")

    def save(self, path: str | Path, scale: int = 1) -> Path:
        """Write the video by its suffix: .mp4 (or another container), .gif, or .png for a contact sheet of its frames.

        `scale` repeats each pixel that many times along both sides, so that tiny videos can be seen. Returns the path.
        Raises ValueError for another suffix, larp.data.video.VideoError if no encoder is at hand.
        """
        check_count("scale", scale)
        path = Path(path)
        check_suffix(path)
        frames = self.frames.repeat(scale, axis=1).repeat(scale, axis=2)
        if path.suffix.lower() == ".png":
            from larp.data.clips import contact_sheet

            contact_sheet([frames], [self.prompt], path)
        else:
            from larp.data.video import write_video

            write_video(path, frames, self.fps)
        return path

    def _repr_html_(self) -> str:
        """What a notebook shows: the video itself, see larp_mllm/notebook.py."""
        from larp_mllm.notebook import to_html

        return to_html(self)

    def __repr__(self) -> str:
        count, height, width = self.frames.shape[:3]
        about = f" of {self.prompt!r}" if self.prompt else ""
        size = f"{count} frames of {width}x{height} at {self.fps:g} fps"
        return f"<Video{about}: {size}; .save('x.mp4' | 'x.gif' | 'x.png') writes it>"


def check_suffix(path: Path) -> None:
    """ValueError unless `Video.save` can write a file with the suffix of `path`."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{path}: no video can be written with the suffix {path.suffix!r}; choose one of {', '.join(SUFFIXES)}"
        )
