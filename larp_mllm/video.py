"""Video: what generate returns, and whether it could be written to a file."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from larp_mllm.checks import check_count, is_whole

import numpy as np

# What libx264 fits into, a GIF, and a contact sheet.
SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp"),
    *(".gif", ".png"),
)
# Pixels: the longest side of a picture that `Video.save` writes; encoders hold no more.
LARGEST_SIDE = 16384


@dataclass(frozen=True, eq=False)
class Video:
    """A generated video: frames uint8 (T, H, W, 3), frames per second, and the prompt and codes it was made from.

    The codes are those of one clip; a video of several windows has none. Of one that goes on, the first `given` frames
    are those that it goes on from; contact sheets frame them in blue. The rate is any real number from 0.01 to 1000,
    which files can hold, kept as a float. In a notebook it shows itself. ValueError for frames of another shape or dtype,
    for none, for another rate, for codes that are no whole numbers, and for more given frames than there are.
    """

    frames: np.ndarray
    fps: float
    prompt: str = ""
    codes: tuple[int, ...] = ()
    given: int = 0

    def __post_init__(self):
        frames = self.frames
        if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            found = f"{frames.dtype} {frames.shape}" if isinstance(frames, np.ndarray) else type(frames).__name__
            raise ValueError(f"frames must be a uint8 array (T, H, W, 3) of 0..255, got {found}: convert it")
        if 0 in frames.shape:
            raise ValueError(f"frames are {frames.shape}: a video has at least one frame of one pixel")
        codes = self.codes.tolist() if hasattr(self.codes, "tolist") else self.codes
        if not isinstance(codes, Sequence) or not all(map(is_whole, codes)):
            raise ValueError(
                f"codes must be whole numbers, got {str(codes)[:60]!r}: leave them out, then the frames alone count"
            )
        object.__setattr__(self, "codes", tuple(int(code) for code in codes))
        if not is_whole(self.given) or not 0 <= self.given <= len(frames):
            raise ValueError(f"given is {self.given!r}; of {len(frames)} frames so many cannot have been there before")
        from larp.data.video import check_fps

        object.__setattr__(self, "fps", check_fps(self.fps))

    def save(self, path: str | Path, scale: int = 1) -> Path:
        """Write the video by its suffix: .mp4 (or another container), .gif, or .png for a contact sheet of its frames.

        `scale` repeats each pixel that many times along both sides, so that tiny videos can be seen. Returns the path.
        Raises ValueError for another suffix, a URL, and pictures of a side over 16384; larp.data.video.VideoError, a
        ValueError too, if no encoder is at hand or the file cannot be written, and then nothing new is there.
        """
        check_count("scale", scale)
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"a video is saved to a file: give its name, got {path!r}")
        path = Path(path)
        check_suffix(path)
        height, width = (side * scale for side in self.frames.shape[1:3])
        if max(height, width) > LARGEST_SIDE:
            raise ValueError(
                f"{path}: pictures of {width}x{height} pixels (scale {scale}) cannot be written, no side may be over "
                f"{LARGEST_SIDE}: choose a smaller scale"
            )
        if path.suffix.lower() == ".png":
            self._save_sheet(path, scale)
        else:
            from larp.data.video import VideoWriter

            with VideoWriter(path, self.fps) as writer:
                for frame in self.frames:  # one by one: scaled, all of them may not fit into memory
                    writer.write(frame.repeat(scale, axis=0).repeat(scale, axis=1)[None])
        return path

    def _save_sheet(self, path: Path, scale: int) -> None:
        from larp.data.clips import contact_sheet
        from larp.data.video import VideoError, check_output

        check_output(path)
        enlarged = {} if scale == 1 else {"cell": max(80, self.frames.shape[1] * scale)}
        legend = f"(blue: the {self.given} frames at hand)" if self.given else ""
        caption = " ".join(text for text in (self.prompt, legend) if text)
        try:
            contact_sheet([self.frames], [caption], path, given=self.given, **enlarged)
        except OSError as error:
            raise VideoError(f"{path}: cannot be written: {error.strerror or error}") from error

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
