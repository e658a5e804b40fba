"""Video: what generate returns, and whether it could be written to a file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

# What libx264 fits into, a GIF, and a contact sheet.
SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp"),
    *(".gif", ".png"),
)


@dataclass(frozen=True, eq=False)
class Video:
    """A generated video: frames uint8 (T, H, W, 3), frames per second, and the prompt and codes it was made from."""

    frames: np.ndarray
    fps: float
    prompt: str = ""
    codes: tuple[int, ...] = ()

    def save(self, path: str | Path, scale: int = 1) -> Path:
        """Write the video by its suffix: .mp4 (or another container), .gif, or .png for a contact sheet of its frames.

        `scale` repeats each pixel that many times along both sides, so that tiny videos can be seen. Returns the path.
        Raises ValueError for another suffix, larp.data.video.VideoError if no encoder is at hand.
        """
        if scale < 1:
            raise ValueError(f"scale must be at least 1, got {scale}")
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
