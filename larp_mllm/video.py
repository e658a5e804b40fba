"""Video: frames and their rate, saved to files and displayed in notebooks."""

import base64
import html
import math
import operator
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from larp.config import check_count, is_whole
from larp.data.clips import scale_frames
from larp.data.contact_sheet import contact_sheet
from larp.data.video import VideoError, VideoWriter, check_fps, write_video
from larp.files import check_output

import numpy as np
import torch

# Containers of libx264, then GIF and contact sheet.
SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp"),
    *(".gif", ".png"),
)
# Pixels of the longest side that `Video.save` writes: the limit of encoders.
LARGEST_SIDE = 16384

# Limits of what a notebook displays and stores: pixels, frames, bytes.
_MIN_HEIGHT, _MAX_SIDE = 256, 512
_MAX_FRAMES = 600
_MAX_BYTES = 4 * 2**20


@dataclass(frozen=True, eq=False)
class Video:
    """A video, displayed by notebooks.

    A sequence of its frames: `len(video)`, `video[3]` (uint8 (H, W, 3)), `video[4:12]` (a Video), iteration, `np.asarray(video)`.
    Two videos are equal if their codes are; of two without codes, if their frames are.

    Raises ValueError for frames of another shape or dtype, no frames, a rate out of range, codes that are no whole
    numbers, and more given frames than frames.
    """

    frames: np.ndarray
    """uint8 (T, H, W, 3)."""
    fps: float
    """Frames per second, 0.01 to 1000."""
    prompt: str = ""
    """The text that it was generated from."""
    codes: tuple[int, ...] = ()
    """The codes that it was decoded from, if it is one clip; a continued video has none."""
    given: int = 0
    """The number of first frames that a continuation was given; contact sheets frame them in blue."""

    def __post_init__(self):
        frames = self.frames
        if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            found = f"{frames.dtype} {frames.shape}" if isinstance(frames, np.ndarray) else type(frames).__name__
            raise ValueError(f"frames must be a uint8 array (T, H, W, 3) of 0..255, got {found}: convert it")
        if 0 in frames.shape:
            raise ValueError(f"frames are {frames.shape}: a video has at least one frame of one pixel")
        codes = self.codes.tolist() if hasattr(self.codes, "tolist") else self.codes
        if not isinstance(codes, Sequence) or not all(map(is_whole, codes)):
            raise ValueError(f"codes must be whole numbers, got {str(codes)[:60]!r}: leave them out")
        object.__setattr__(self, "codes", tuple(int(code) for code in codes))
        if not is_whole(self.given) or not 0 <= self.given <= len(frames):
            raise ValueError(f"given is {self.given!r}; of {len(frames)} frames it must be a whole number from 0 on")
        object.__setattr__(self, "fps", check_fps(self.fps))

    def __len__(self) -> int:
        """The number of frames."""
        return len(self.frames)

    def __getitem__(self, index: int | slice) -> "np.ndarray | Video":
        """A frame, uint8 (H, W, 3), or the Video of a slice.

        Every n-th frame has the rate / n. The prompt stays; the codes stay if all frames do. Raises IndexError for a frame that
        is not there, TypeError for other types, ValueError for a slice without frames.
        """
        if not isinstance(index, slice):
            return self.frames[operator.index(index)]
        chosen = range(len(self))[index]
        given = sum(frame < self.given for frame in chosen) if chosen.step > 0 else 0
        codes = self.codes if chosen == range(len(self)) else ()
        return Video(self.frames[index], self.fps / abs(chosen.step), self.prompt, codes, given)

    def __iter__(self) -> Iterator[np.ndarray]:
        """The frames, uint8 (H, W, 3), in order."""
        return iter(self.frames)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Video):
            return NotImplemented
        return self.codes == other.codes and (bool(self.codes) or np.array_equal(self.frames, other.frames))

    def __hash__(self) -> int:
        return hash(self.codes or self.frames.shape)

    def __array__(self, dtype=None, copy: bool | None = None) -> np.ndarray:
        """The frames for numpy, (T, H, W, 3)."""
        return np.array(self.frames, dtype=dtype, copy=copy)

    def numpy(self) -> np.ndarray:
        """The frames, uint8 (T, H, W, 3)."""
        return self.frames

    def torch(self) -> torch.Tensor:
        """The frames as a tensor, uint8 (T, H, W, 3)."""
        return torch.from_numpy(np.require(self.frames, requirements=("C", "W")))

    def save(self, path: str | Path, scale: int = 1) -> Path:
        """Save the video by suffix: .mp4 or another container, .gif, or .png for a contact sheet of its frames.

        Args:
            path: name of the file.
            scale: repeat each pixel so many times along both sides, to enlarge tiny videos.

        Returns the path. Raises ValueError for another suffix, a URL, and a side above 16384 pixels;
        larp.data.video.VideoError, a ValueError, if there is no encoder or the file cannot be written. After an error
        there is no new file.
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
            with VideoWriter(path, self.fps) as writer:
                for frame in self.frames:  # one by one: all enlarged frames may not fit into memory
                    writer.write(frame.repeat(scale, axis=0).repeat(scale, axis=1)[None])
        return path

    def _save_sheet(self, path: Path, scale: int) -> None:
        check_output(path)
        enlarged = {} if scale == 1 else {"cell": max(80, self.frames.shape[1] * scale)}
        legend = f"(blue: the {self.given} given frames)" if self.given else ""
        caption = " ".join(text for text in (self.prompt, legend) if text)
        try:
            contact_sheet([self.frames], [caption], path, given=self.given, **enlarged)
        except OSError as error:
            raise VideoError(f"{path}: cannot be written: {error.strerror or error}") from error

    def _repr_html_(self) -> str:
        """The video as HTML for notebooks, tiny frames enlarged, long videos cut with a note. Never raises."""
        try:
            return _figure(self)
        except Exception as error:  # an error here would hide the value of the notebook's cell
            return f"<pre>{html.escape(f'{self!r} cannot be displayed: {type(error).__name__}: {error}')}</pre>"

    def __repr__(self) -> str:
        count, height, width = self.frames.shape[:3]
        about = f" of {self.prompt!r}" if self.prompt else ""
        size = f"{count} frames of {width}x{height} at {self.fps:g} fps"
        return f"<Video{about}: {size}; .save('x.mp4' | 'x.gif' | 'x.png') writes it>"


def check_suffix(path: Path) -> None:
    """Raise ValueError unless `Video.save` supports the suffix of `path`."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{path}: no video can be written with the suffix {path.suffix!r}; choose one of {', '.join(SUFFIXES)}"
        )


def _figure(video: Video) -> str:
    count, height, width = video.frames.shape[:3]
    displayed = _resized(video.frames[:_MAX_FRAMES])
    note = "" if count <= _MAX_FRAMES else f"; the first {_MAX_FRAMES} are shown, .save writes all"
    size = f"{count} frames of {width}x{height} at {video.fps:g} fps{note}"
    caption = " · ".join(html.escape(text) for text in (video.prompt, size) if text)
    return f"<figure style='margin:0'>{_element(displayed, video)}<figcaption>{caption}</figcaption></figure>"


def _element(frames: np.ndarray, video: Video) -> str:
    """The HTML element of the first format that can be encoded and is small enough: MP4, GIF, contact sheet."""
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
            if path.stat().st_size <= _MAX_BYTES:
                return element.format(_data_url(path, media))
        path = Path(folder, "x.png")
        contact_sheet([frames], [""], path, cell=160, given=video.given)
        return f'<img src="{_data_url(path, "image/png")}">'


def _data_url(path: Path, media: str) -> str:
    return f"data:{media};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _resized(frames: np.ndarray) -> np.ndarray:
    """Tiny frames with each pixel repeated, large ones scaled down to even sides, which MP4 needs."""
    height, width = frames.shape[1:3]
    longest = max(height, width)
    factor = min(math.ceil(_MIN_HEIGHT / height), _MAX_SIDE // longest)
    if factor > 1:
        return frames.repeat(factor, axis=1).repeat(factor, axis=2)
    if longest <= _MAX_SIDE:
        return frames
    scale = _MAX_SIDE / longest
    return scale_frames(frames, *(max(2, 2 * round(side * scale / 2)) for side in (height, width)))
