"""Reads video files into uint8 frames (T, H, W, 3) and writes them, with PyAV.

PNG and JPEG files read as one frame, and .npy files of frames as videos (without PyAV). Every failure is a `VideoError`
that names the file. FFmpeg may stop early without an error, so the number of decoded frames is checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from larp.data.open_video import (
    DECODE_ERRORS,
    FRAMES_PER_SECOND,
    MAX_BYTES,
    MAX_PIXELS,
    VideoError,
    av,
    check_pyav,
    has_pyav,
    is_frame_file,
    open_frames,
    opened,
)
from larp.data.video_encoders import Encoding, Gif, Movie, check_encoder
from larp.files import check_output, replacing

import numpy as np

if TYPE_CHECKING:
    from larp.data.audio import AudioTrack

MIN_FPS, MAX_FPS = 0.01, 1000.0
"""Frame rates that can be written: a GIF stores delays as 16 bits of hundredths of a second."""
VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".gif", ".mpg", ".mpeg", ".ts", ".flv", ".ogv", ".wmv", ".3gp")
)


class ShortVideoError(VideoError):
    """A video with fewer frames than requested; `.frames` is the number that it holds."""

    def __init__(self, message: str, frames: int):
        super().__init__(message)
        self.frames = frames


@dataclass(frozen=True)
class VideoInfo:
    """The result of `probe`: display size in pixels, frames, frames per second, codec, duration in seconds.

    `even` is False for a variable frame rate; `fps` is then the average.
    """

    width: int
    height: int
    frames: int
    fps: float
    codec: str
    duration_s: float
    even: bool = True


def probe(path: str | Path, max_pixels: int = MAX_PIXELS) -> VideoInfo:
    """Describe a video file by its header and first frame; packets are counted if the header has no frame count.

    Decoding may yield fewer frames than `frames`. Raises VideoError.
    """
    if is_frame_file(path):
        frames, height, width = open_frames(path, max_pixels).shape[:3]
        return VideoInfo(width, height, frames, FRAMES_PER_SECOND, "npy", frames / FRAMES_PER_SECOND)
    with opened(path, max_pixels) as (container, stream):
        frames = stream.frames or _count_packets(container, stream)
        if stream.frames == 0:
            container.seek(0)
        first = next(container.decode(stream), None)
        if first is None:
            raise VideoError(f"{path}: holds no video frame")
        height, width = (first.width, first.height) if first.rotation % 180 else (first.height, first.width)
        fps = _fps(stream)
        even = stream.base_rate is None or abs(float(stream.base_rate) / fps - 1) < 0.01
        return VideoInfo(width, height, frames, fps, stream.codec_context.name, frames / fps, even)


def count_frames(path: str | Path) -> int:
    """Return the number of frames by a video file's header or packets, without decoding. Raises VideoError."""
    if is_frame_file(path):
        return len(open_frames(path))
    with opened(path) as (container, stream):
        return stream.frames or _count_packets(container, stream)


def read_video(
    path: str | Path, start: int = 0, count: int | None = None, stride: int = 1, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, float]:
    """Read the frames start, start + stride, ... of a file; return uint8 (T, H, W, 3) RGB and the file's fps.

    `count` is the number of frames to return (None: to the end). Rotation metadata is applied. Decoding starts at the
    first frame, because seeking is inexact with variable frame rates and broken indices.

    Raises VideoError; ShortVideoError if there are fewer than `count` frames, or a read to the end yields far fewer than
    the header states.
    """
    _check_choice(path, start, count, stride)
    if is_frame_file(path):
        return _read_frame_file(path, start, count, stride, max_pixels), FRAMES_PER_SECOND
    frames: list[np.ndarray] = []
    with opened(path, max_pixels) as (container, stream):
        fps, decoded = _fps(stream), _Decoded(stream.frames)
        for frame in _pictures(path, container, stream, decoded, start, count, stride):
            frames.append(frame)
            _check_memory(path, frame.nbytes * len(frames))
    _check_frame_count(path, start, count, stride, len(frames), decoded)
    return np.stack(frames), fps


def iter_frames(path: str | Path, max_pixels: int = MAX_PIXELS) -> Iterator[np.ndarray]:
    """Yield every frame of a video file as uint8 (H, W, 3), one at a time. Raises VideoError."""
    if is_frame_file(path):
        yield from map(np.array, open_frames(path, max_pixels))
        return
    with opened(path, max_pixels) as (container, stream):
        decoded = _Decoded(stream.frames)
        yield from _pictures(path, container, stream, decoded, 0, None, 1)
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
    ):
        self.path = Path(path)
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
            return Gif(self._temporary, self._rate)
        check_pyav(self.path)
        check_encoder(self.path, self._encoding.codec)
        if audio is not None:
            try:
                return Movie(self._temporary, self._rate, self._size, self._encoding, audio)
            except DECODE_ERRORS:
                audio.notes.append(f"the sound was left out: {self.path.suffix} cannot hold {audio.codec}, .mkv can")
        return Movie(self._temporary, self._rate, self._size, self._encoding, None)

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
    """Number of frames by the header (0: unknown), and number of frames decoded so far, returned or not."""

    expected: int
    frames: int = 0


def _pictures(
    path, container, stream, decoded: _Decoded, start: int, count: int | None, stride: int
) -> Iterator[np.ndarray]:
    """Yield the chosen frames of an opened stream as uint8 (H, W, 3), with rotation metadata applied."""
    size, last = None, None if count is None else start + (count - 1) * stride
    convert = av.video.reformatter.VideoReformatter()  # shared: its set-up costs more than converting a small frame
    for index, frame in enumerate(container.decode(stream)):
        decoded.frames = index + 1
        if index >= start and (index - start) % stride == 0:
            if frame.is_corrupt:
                raise VideoError(f"{path}: frame {index} is damaged")
            size = size or (frame.width, frame.height)
            if (frame.width, frame.height) != size:
                raise VideoError(f"{path}: the frame size changes at frame {index}; re-encode the file")
            # Both FFmpeg's rotation and rot90 are counter-clockwise.
            pixels = convert.reformat(frame, format="rgb24").to_ndarray()
            yield np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
        if index == last:
            return


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
    if not got:
        raise ShortVideoError(f"{path}: holds {held} frames, none at or after frame {start}", held)


def _count_packets(container, stream) -> int:
    return sum(1 for packet in container.demux(stream) if packet.size)


def _fps(stream) -> float:
    return float(stream.average_rate or stream.base_rate or 25)


def _rational(fps: float) -> Fraction:
    return Fraction(check_fps(fps)).limit_denominator(1001)
