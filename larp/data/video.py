"""Reads video files into uint8 frames (T, H, W, 3) and writes them, with PyAV.

PNG and JPEG files read as one frame, and .npy files of frames as videos (without PyAV). Every failure is a `VideoError`
that names the file. FFmpeg may stop early without an error, so the number of decoded frames is checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from larp.data.container_layout import lacks_end
from larp.data.frame_times import FrameTimes, first_tick, promised_frames, read_times, whole_packets
from larp.data.open_video import (
    DECODE_ERRORS,
    FRAMES_PER_SECOND,
    MAX_BYTES,
    MAX_PIXELS,
    VideoError,
    check_pyav,
    has_pyav,
    is_frame_file,
    open_frames,
    opened,
)
from larp.data.upright import Upright
from larp.data.video_encoders import Encoding, Gif, Movie, check_encoder
from larp.files import check_output, replacing

import numpy as np

if TYPE_CHECKING:
    from larp.data.audio import AudioTrack

MIN_FPS, MAX_FPS = 0.01, 1000.0
"""Frame rates that can be written: a GIF stores delays as 16 bits of hundredths of a second."""
VIDEO_SUFFIXES = frozenset(
    (
        ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".gif", ".mpg", ".mpeg", ".ts", ".flv", ".ogv", ".wmv", ".3gp",
        ".mts", ".m2ts", ".vob",
    )
)  # fmt: skip


class ShortVideoError(VideoError):
    """A video with fewer frames than requested; `.frames` is the number that it holds."""

    def __init__(self, message: str, frames: int):
        super().__init__(message)
        self.frames = frames


@dataclass(frozen=True)
class VideoInfo:
    """The result of `probe`: size in which frames are shown, in pixels, shown frames, frames per second, codec, seconds.

    `times` holds the times of the frames; `fps` is the average where they are uneven.
    """

    width: int
    height: int
    frames: int
    fps: float
    codec: str
    duration_s: float
    times: FrameTimes = field(repr=False, compare=False)

    @property
    def even(self) -> bool:
        """Whether the frames come at even times."""
        return self.times.seconds is None


def probe(path: str | Path, max_pixels: int = MAX_PIXELS) -> VideoInfo:
    """Describe a video file by its packets and first frame, see `frame_times`. Raises VideoError.

    Decoding may yield fewer frames than `frames`, if the file is damaged.
    """
    if is_frame_file(path):
        height, width = open_frames(path, max_pixels).shape[1:3]
        return _info(width, height, "npy", frame_times(path))
    with opened(path, max_pixels) as (container, stream):
        times = read_times(path, container, stream)
    with opened(path, max_pixels) as (container, stream):  # anew: a damaged index does not lead back to the beginning
        upright = _upright(path, container, stream, max_pixels)
        first = next(container.decode(stream), None)
        if first is None:
            raise VideoError(f"{path}: holds no video frame")
        height, width = upright.size(first)
        return _info(width, height, stream.codec_context.name, times)


def frame_times(path: str | Path) -> FrameTimes:
    """Return the number of frames of a video file that are shown, and when, without decoding. Raises VideoError.

    Frames that an edit list hides do not count.
    """
    if is_frame_file(path):
        return FrameTimes(len(open_frames(path)), FRAMES_PER_SECOND)
    with opened(path) as (container, stream):
        return read_times(path, container, stream)


def count_frames(path: str | Path) -> int:
    """Return the number of frames of a video file that are shown, see `frame_times`. Raises VideoError."""
    return frame_times(path).count


def read_video(
    path: str | Path, start: int = 0, count: int | None = None, stride: int = 1, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, float]:
    """Read frames of a file as `read_clip` does; return uint8 (T, H, W, 3) RGB and the file's fps. Raises its errors."""
    return read_clip(path, start, count, stride, max_pixels), frame_times(path).fps


def read_clip(
    path: str | Path, start: int = 0, count: int | None = None, stride: int = 1, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Read the frames start, start + stride, ... of a file; return uint8 (T, H, W, 3) RGB.

    `count` is the number of frames to return (None: to the end). Frames are as they are shown: turned or mirrored where
    the file says so, with square pixels, without those that an edit list hides. Decoding starts at the first frame,
    because seeking is inexact with variable frame rates and broken indices.

    Raises VideoError; ShortVideoError if there are fewer than `count` frames, or a read to the end yields far fewer than
    the file promises.
    """
    _check_choice(path, start, count, stride)
    if is_frame_file(path):
        return _read_frame_file(path, start, count, stride, max_pixels)
    frames: list[np.ndarray] = []
    with opened(path, max_pixels) as (container, stream):
        decoded = _promise(path, container, stream) if count is None else _Decoded(0)
        upright = _upright(path, container, stream, max_pixels)
        for frame in _pictures(path, container, stream, upright, decoded, start, count, stride):
            frames.append(frame)
            _check_memory(path, frame.nbytes * len(frames))
    _check_frame_count(path, start, count, stride, len(frames), decoded)
    return np.stack(frames)


def iter_frames(path: str | Path, max_pixels: int = MAX_PIXELS) -> Iterator[np.ndarray]:
    """Yield every frame of a video file as uint8 (H, W, 3), one at a time. Raises VideoError."""
    if is_frame_file(path):
        yield from map(np.array, open_frames(path, max_pixels))
        return
    with opened(path, max_pixels) as (container, stream):
        decoded = _promise(path, container, stream)
        upright = _upright(path, container, stream, max_pixels)
        yield from _pictures(path, container, stream, upright, decoded, 0, None, 1)
    _check_frame_count(path, 0, None, 1, decoded.frames, decoded)


class VideoWriter:
    """Writes a video file piece by piece, for videos that do not fit in memory; a context manager.

    The file appears under its name when the block ends without an exception, and not at all otherwise.

        with AudioTrack("in.mp4") as audio, VideoWriter("out.mp4", fps=25, audio=audio) as writer:
            for frames in pieces:  # uint8 (T, H, W, 3)
                writer.write(frames)

    Args:
        path: its suffix selects the container; .gif makes an animated GIF, whose frames are held in memory.
        fps: frames per second, see `check_fps`.
        codec: an encoder of FFmpeg.
        quality: on x264's CRF scale, from 0 (best) to 51; ignored for a GIF.
        pixel_format: the default plays everywhere, but halves the colour resolution and pads odd sides by repeating the
            last row or column. "yuv444p" keeps full colour and odd sizes, but browsers may not play it.
        preset, tune: x264's speed preset and tuning ("psnr" favours pixel error over appearance); x265 takes them too,
            other codecs ignore them.
        audio: copied without encoding; if the container cannot hold it, it is left out and `audio.notes` says why.
        seconds: the time of each frame, ascending from 0, where they do not come evenly at `fps`, their average. Ignored
            unless `holds_uneven_times(path)`.

    Raises VideoError for an invalid rate, a URL, a file that cannot be written, and an encoder that is not available.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float,
        *,
        codec: str = "libx264",
        quality: int = 18,
        pixel_format: str = "yuv420p",
        preset: str = "medium",
        tune: str | None = None,
        audio: AudioTrack | None = None,
        seconds: Sequence[float] | None = None,
    ):
        self.path = Path(path)
        self._seconds, self._apart = (seconds, False) if holds_uneven_times(path) else (None, seconds is not None)
        try:
            check_output(self.path)
        except ValueError as error:
            raise VideoError(str(error)) from error
        self._rate, self._audio = _rational(fps), audio
        self._encoding = Encoding(codec, quality, pixel_format, preset, tune)
        self._size: tuple[int, ...] | None = None
        self._sink: Movie | Gif | None = None

    def __enter__(self) -> VideoWriter:
        with self._errors():
            self._files = ExitStack()
            self._temporary = str(self._files.enter_context(replacing(self.path)))
        return self

    def write(self, frames: np.ndarray) -> None:
        """Append uint8 (T, H, W, 3) RGB frames, T > 0, all of one size."""
        frames = np.asarray(frames)
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
            raise VideoError(
                f"{self.path}: frames must be uint8 (T, H, W, 3) with T > 0, not {frames.dtype} {frames.shape}"
            )
        self._size = self._size or frames.shape[1:]
        if frames.shape[1:] != self._size:
            raise VideoError(f"{self.path}: frames of {frames.shape[1:]} after frames of {self._size}; need one size")
        with self._errors():
            self._sink = self._sink or self._open()
            self._sink.add(frames)

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                if self._sink is None:
                    raise VideoError(f"{self.path}: no frame was written")
                with self._errors():
                    self._sink.finish()
                    self._files.close()
        finally:
            if isinstance(self._sink, Movie):
                self._sink.close()
            # Without effect where the file has its name; else the temporary file is removed.
            self._files.__exit__(kind or VideoError, error, trace)

    def _open(self) -> Movie | Gif:
        audio = self._audio if self._audio is not None and self._audio.stream is not None else None
        if self.path.suffix.lower() == ".gif":
            if audio is not None:
                audio.notes.append("the sound was left out: a .gif holds none")
            return Gif(self._temporary, self._rate, self._seconds)
        if audio is not None and self._apart:
            audio.notes.append(
                f"the sound was left out: a {self.path.suffix} cannot show frames at uneven times, .mkv can"
            )
            audio = None
        check_pyav(self.path)
        check_encoder(self.path, self._encoding.codec)
        if audio is not None:
            with suppress(*DECODE_ERRORS):
                return Movie(self._temporary, self._rate, self._size, self._encoding, audio, self._seconds)
            audio.notes.append(f"the sound was left out: {self.path.suffix} cannot hold {audio.codec}, .mkv can")
        return Movie(self._temporary, self._rate, self._size, self._encoding, None, self._seconds)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except VideoError:
            raise
        except DECODE_ERRORS as error:
            if isinstance(error, OSError) and error.strerror:  # a full disk, a folder: no fault of the encoding
                raise VideoError(f"{self.path}: cannot be written: {error.strerror}") from error
            if isinstance(self._sink, Gif):
                raise VideoError(f"{self.path}: cannot be written as a GIF: {error}") from error
            raise VideoError(
                f"{self.path}: cannot be written with codec {self._encoding.codec!r}, pixel format "
                f"{self._encoding.pixel_format!r}: {error}"
            ) from error


def holds_uneven_times(path: str | Path) -> bool:
    """Whether the container of a file name stores a time for each frame that is written to it, and not one rate."""
    return Path(path).suffix.lower() not in (".avi", ".mpg", ".mpeg", ".vob")


def check_fps(fps: float) -> float:
    """Return the frames per second as a float. Raises VideoError unless they are from `MIN_FPS` to `MAX_FPS`."""
    if not isinstance(fps, Real) or not MIN_FPS <= fps <= MAX_FPS:
        raise VideoError(f"fps is {fps!r}; it must be a number from {MIN_FPS:g} to {MAX_FPS:g}, to be written to files")
    return float(fps)


def write_video(path: str | Path, frames: np.ndarray, fps: float, **encoding) -> None:
    """Write uint8 (T, H, W, 3) RGB frames to a video file atomically.

    `encoding` holds further arguments of `VideoWriter`. Raises VideoError.
    """
    with VideoWriter(path, fps, **encoding) as writer:
        writer.write(frames)


@cache
def movies_are_written() -> bool:
    """Whether scripts write videos beside their pictures; prints a note once if PyAV is missing."""
    if not has_pyav():
        print("note: pictures only, no videos beside them: PyAV is missing (pip install av)")
    return has_pyav()


@dataclass
class _Decoded:
    """Number of frames that the file promises (0: unknown), and number of frames decoded so far, returned or not."""

    expected: int
    frames: int = 0
    stored: int = 0
    """Packets that were decoded, from the first key frame on, where each holds one frame; else 0."""
    unfinished: bool = False
    """Whether the file is known to stop early, though not before which frame."""


def _promise(path, container, stream) -> _Decoded:
    promised, kind = promised_frames(path, container, stream), container.format.name
    told = promised and kind.startswith("matroska")  # of which perhaps only the index at its end is lost
    return _Decoded(promised, unfinished=not told and lacks_end(path, kind))


def _frames(path, container, stream, decoded: _Decoded) -> Iterator:
    """Yield the decoded frames that are shown. FFmpeg leaves out frames without an error if those that they refer to are lost."""
    counted = stream.codec_context.name in ("h264", "hevc") and container.format.name not in ("mpegts", "mpeg")
    begin = first_tick(path, container)
    for packet in whole_packets(container, stream):
        shown = packet.size > 0 and (packet.pts is None or packet.pts >= begin)
        decoded.stored += counted and shown and (packet.is_keyframe or decoded.stored > 0)
        yield from (frame for frame in packet.decode() if frame.pts is None or frame.pts >= begin)


def _pictures(
    path, container, stream, upright: Upright, decoded: _Decoded, start: int, count: int | None, stride: int
) -> Iterator[np.ndarray]:
    """Yield the chosen frames of an opened stream as uint8 (H, W, 3), as they are shown."""
    size, last = None, None if count is None else start + (count - 1) * stride
    for index, frame in enumerate(_frames(path, container, stream, decoded)):
        decoded.frames = index + 1
        if index >= start and (index - start) % stride == 0:
            if frame.is_corrupt:
                raise VideoError(f"{path}: frame {index} is damaged")
            size = size or (frame.width, frame.height)
            if (frame.width, frame.height) != size:
                raise VideoError(f"{path}: the frame size changes at frame {index}; re-encode the file")
            yield upright.pixels(frame)
        if index == last:
            return


def _upright(path, container, stream, max_pixels: int) -> Upright:
    """Return the converter of an opened stream. Raises VideoError if frames are shown with over `max_pixels` pixels."""
    upright, codec = Upright(path, container, stream), stream.codec_context
    width = round(codec.width * upright.shape)
    if width * codec.height > max_pixels:
        raise VideoError(f"{path}: {width}x{codec.height} pixels per shown frame are over max_pixels={max_pixels}")
    return upright


def _info(width: int, height: int, codec: str, times: FrameTimes) -> VideoInfo:
    return VideoInfo(width, height, times.count, times.fps, codec, times.count / times.fps, times)


def _read_frame_file(path, start: int, count: int | None, stride: int, max_pixels: int) -> np.ndarray:
    frames = open_frames(path, max_pixels)
    chosen = frames[start::stride] if count is None else frames[start : start + (count - 1) * stride + 1 : stride]
    _check_memory(path, chosen.nbytes)
    _check_frame_count(path, start, count, stride, len(chosen), _Decoded(len(frames), len(frames)))
    return np.array(chosen)  # a copy, so that the file does not stay mapped


def _check_choice(path, start: int, count: int | None, stride: int) -> None:
    if start < 0 or stride < 1 or (count is not None and count < 1):
        raise VideoError(
            f"{path}: start={start}, count={count}, stride={stride}; need start >= 0, count >= 1, stride >= 1"
        )


def _check_memory(path, needed: int) -> None:
    if needed > MAX_BYTES:
        raise VideoError(f"{path}: needs more than {MAX_BYTES >> 30} GiB of frames; read a part of it (start, count)")


def _check_frame_count(path, start: int, count: int | None, stride: int, got: int, decoded: _Decoded) -> None:
    """Raise ShortVideoError if decoding stopped early; headers that are off by 2 frames or 2 % are common."""
    held, expected = decoded.frames, decoded.expected
    if count is not None and got < count:
        wanted = f"asked for {count} frames from frame {start}" + (f" at stride {stride}" if stride > 1 else "")
        raise ShortVideoError(f"{path}: {wanted}, but the video holds {held}", held)
    if count is None and held < expected - max(2, expected // 50):
        raise ShortVideoError(f"{path}: truncated: the header promises {expected} frames, {held} decode", held)
    if count is None and decoded.unfinished:
        raise ShortVideoError(f"{path}: truncated: the file stops before its end, {held} frames decode", held)
    if count is None and not expected and held < decoded.stored - max(2, decoded.stored // 50):
        raise ShortVideoError(f"{path}: damaged: of {decoded.stored} stored frames {held} decode", held)
    if not got:
        raise ShortVideoError(f"{path}: holds {held} frames, none at or after frame {start}", held)


def _rational(fps: float) -> Fraction:
    return Fraction(check_fps(fps)).limit_denominator(1001)
