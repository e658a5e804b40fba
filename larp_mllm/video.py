"""Video: what generate returns, and whether it could be written to a file."""

import base64
import html
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from larp.data.clips import scale_frames
from larp.data.contact_sheet import contact_sheet
from larp.data.video import VideoError, write_video
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
        from larp.data.contact_sheet import contact_sheet
        from larp.data.video import VideoError
        from larp.files import check_output

        check_output(path)
        enlarged = {} if scale == 1 else {"cell": max(80, self.frames.shape[1] * scale)}
        legend = f"(blue: the {self.given} frames at hand)" if self.given else ""
        caption = " ".join(text for text in (self.prompt, legend) if text)
        try:
            contact_sheet([self.frames], [caption], path, given=self.given, **enlarged)
        except OSError as error:
            raise VideoError(f"{path}: cannot be written: {error.strerror or error}") from error

    def _repr_html_(self) -> str:
        """What a notebook shows: the video itself, see larp_mllm/video.py."""

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


# A notebook keeps what it shows: a side of a picture, frames and bytes are bounded.
_LEAST_HEIGHT, _LARGEST_SIDE = 256, 512
_MOST_FRAMES = 600
_MOST_BYTES = 4 * 2**20


def to_html(video: "Video") -> str:
    """The video as HTML that holds it, tiny pictures enlarged; longer ones are cut, with a note. Never raises."""
    try:
        return _figure(video)
    except Exception as error:  # whatever it is, a cell's value must show as something
        return f"<pre>{html.escape(f'{video!r} cannot be shown here: {type(error).__name__}: {error}')}</pre>"


def _figure(video: "Video") -> str:
    count, height, width = video.frames.shape[:3]
    shown = _sized(video.frames[:_MOST_FRAMES])
    note = "" if count <= _MOST_FRAMES else f"; the first {_MOST_FRAMES} are shown, .save writes all"
    size = f"{count} frames of {width}x{height} at {video.fps:g} fps{note}"
    caption = " · ".join(html.escape(text) for text in (video.prompt, size) if text)
    return f"<figure style='margin:0'>{_picture(shown, video)}<figcaption>{caption}</figcaption></figure>"


def _picture(frames: np.ndarray, video: "Video") -> str:
    side = f'width="{frames.shape[2]}" height="{frames.shape[1]}"'
    with tempfile.TemporaryDirectory() as folder:
        for name, media, element in (
            ("x.mp4", "video/mp4", f'<video {side} controls loop autoplay muted playsinline src="{{}}"></video>'),
            ("x.gif", "image/gif", f'<img {side} src="{{}}">'),
        ):
            path = Path(folder, name)
            try:
                write_video(path, frames, video.fps)
            except VideoError:  # no encoder; a GIF needs none
                continue
            if path.stat().st_size <= _MOST_BYTES:
                return element.format(_data(path, media))
        path = Path(folder, "x.png")
        contact_sheet([frames], [""], path, cell=160, given=video.given)
        return f'<img src="{_data(path, "image/png")}">'


def _data(path: Path, media: str) -> str:
    return f"data:{media};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _sized(frames: np.ndarray) -> np.ndarray:
    """Each pixel repeated until a tiny video can be seen, or a large one made smaller; even sides, as MP4 wants them."""
    height, width = frames.shape[1:3]
    longest = max(height, width)
    factor = min(math.ceil(_LEAST_HEIGHT / height), _LARGEST_SIDE // longest)
    if factor > 1:
        return frames.repeat(factor, axis=1).repeat(factor, axis=2)
    if longest <= _LARGEST_SIDE:
        return frames
    scale = _LARGEST_SIDE / longest
    return scale_frames(frames, *(max(2, 2 * round(side * scale / 2)) for side in (height, width)))
