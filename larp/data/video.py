"""Video files <-> uint8 frames (T, H, W, 3), with PyAV and nothing else.

Every file is treated as hostile: the demuxer is chosen from the file's first bytes (so playlists, which open other
files, are refused), the picture size is checked before a frame is decoded, and every failure is a `VideoError` that
names the file. FFmpeg may end early in silence, so the number of frames that came out is compared with the number that
was asked for.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

MAX_PIXELS = 4096 * 4096
MAX_BYTES = 8 * 2**30
VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".gif", ".mpg", ".mpeg", ".ts", ".flv", ".ogv", ".wmv", ".3gp")
)

# What PyAV raises on mutated files, measured on 9,600 decodes (OSError covers EOFError's FFmpeg twin and
# PermissionError).
_DECODE_ERRORS = (
    av.error.FFmpegError,
    OSError,
    IndexError,
    UnicodeDecodeError,
    MemoryError,
    EOFError,
    ValueError,
    RuntimeError,
)
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"v=0")
_ENCODER_CHOICES = ("libx264", "libopenh264", "mpeg4", "libx265", "libvpx-vp9", "mjpeg")

av.logging.set_level(
    av.logging.PANIC
)  # FFmpeg's own lines would tear the progress bars; what matters reaches VideoError


class VideoError(ValueError):
    """A video file that cannot be read or written; the message names the file and the reason."""


class ShortVideoError(VideoError):
    """A video that ended before the frames that were asked for; `.frames` is how many frames it does hold."""

    def __init__(self, message: str, frames: int):
        super().__init__(message)
        self.frames = frames


@dataclass(frozen=True)
class VideoInfo:
    """What `probe` tells about a video file: display size in pixels, frames, frames per second, codec."""

    width: int
    height: int
    frames: int
    fps: float
    codec: str
    duration_s: float


def probe(path: str | Path, max_pixels: int = MAX_PIXELS) -> VideoInfo:
    """Describe a video file by its header, its first frame and, when the header does not count them, its packets.

    `frames` is the header's promise, so decoding may find fewer. Raises VideoError.
    """
    with _opened(path, max_pixels) as (container, stream):
        frames = stream.frames or _count_packets(container, stream)
        if stream.frames == 0:
            container.seek(0)
        first = next(container.decode(stream), None)
        if first is None:
            raise VideoError(f"{path}: holds no video frame")
        height, width = (first.width, first.height) if first.rotation % 180 else (first.height, first.width)
        fps = _fps(stream)
        return VideoInfo(width, height, frames, fps, stream.codec_context.name, frames / fps)


def count_frames(path: str | Path) -> int:
    """Return how many frames a video file's header or packets promise, without decoding. Raises VideoError."""
    with _opened(path, MAX_PIXELS) as (container, stream):
        return stream.frames or _count_packets(container, stream)


def read_video(
    path: str | Path, start: int = 0, count: int | None = None, stride: int = 1, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, float]:
    """Read frames start, start + stride, ... of a file: uint8 (T, H, W, 3) RGB, and the file's fps.

    `count` is the number of frames to return (None: to the end); rotation metadata is applied. Decodes from the first
    frame on, because seeking is inexact in files with variable frame rates or broken indices, and converts only what is
    returned. Raises VideoError; ShortVideoError if fewer than `count` frames are there, or a whole read ends well
    before the header says.
    """
    frames: list[np.ndarray] = []
    with _opened(path, max_pixels) as (container, stream):
        fps, decoded = _fps(stream), _Decoded(stream.frames)
        for frame in _pictures(path, container, stream, decoded, start, count, stride):
            frames.append(frame)
            if frame.nbytes * len(frames) > MAX_BYTES:
                raise VideoError(
                    f"{path}: needs more than {MAX_BYTES >> 30} GiB of frames; read a part of it (start, count)"
                )
    _check_promise(path, start, count, stride, len(frames), decoded)
    return np.stack(frames), fps


def iter_frames(path: str | Path, max_pixels: int = MAX_PIXELS) -> Iterator[np.ndarray]:
    """Yield every frame of a video file as uint8 (H, W, 3), in bounded memory. Raises VideoError."""
    with _opened(path, max_pixels) as (container, stream):
        decoded = _Decoded(stream.frames)
        yield from _pictures(path, container, stream, decoded, 0, None, 1)
    _check_promise(path, 0, None, 1, decoded.frames, decoded)


def write_video(
    path: str | Path,
    frames: np.ndarray,
    fps: float,
    codec: str = "libx264",
    quality: int = 18,
    pixel_format: str = "yuv420p",
    preset: str = "medium",
) -> None:
    """Write uint8 (T, H, W, 3) RGB frames to a video file, or to an animated GIF if the suffix is .gif; atomic.

    `quality` is on x264's CRF scale, 0 (best) to 51; a GIF knows no quality. The default pixel format plays everywhere
    but keeps colour at half resolution and needs even sizes: an odd side is padded by repeating its last row or column.
    "yuv444p" keeps colours and odd sizes exactly, but browsers may not play it. `preset` is x264's speed setting,
    ignored by other codecs. Raises VideoError, with the encoders at hand if `codec` is missing.
    """
    path, frames = Path(path), np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise VideoError(f"{path}: frames must be uint8 (T, H, W, 3) with T > 0, not {frames.dtype} {frames.shape}")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".writing-", suffix=path.suffix or ".mp4", dir=path.parent)
    os.close(handle)
    try:
        if path.suffix.lower() == ".gif":
            _write_gif(temporary, frames, fps)
        else:
            _encode(path, temporary, frames, fps, codec, quality, pixel_format, preset)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


# Reading


def _container_format(path: str | Path, head: bytes) -> str:
    """Choose FFmpeg's demuxer from a file's first bytes; a playlist or an unknown file is a VideoError."""
    if not head:
        raise VideoError(f"{path}: the file is empty")
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return "mov"
    if head[:4] == b"RIFF" and head[8:11] == b"AVI":
        return "avi"
    if head[0] == 0x47 and head[188:189] == b"\x47":
        return "mpegts"
    for magic, name in (
        (b"\x1a\x45\xdf\xa3", "matroska"), (b"GIF8", "gif"), (b"FLV\x01", "flv"), (b"OggS", "ogg"), (b"DKIF", "ivf"),
        (b"\x30\x26\xb2\x75", "asf"), (b"\x00\x00\x01\xba", "mpeg"), (b"\x00\x00\x01\xb3", "mpegvideo"),
    ):  # fmt: skip
        if head.startswith(magic):
            return name
    if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(_PLAYLISTS):
        raise VideoError(f"{path}: is a playlist, which may open other files; give the video files themselves")
    raise VideoError(
        f"{path}: does not begin like a video file (mp4, mov, avi, mkv, webm, gif, flv, ogg, ivf, wmv, mpeg)"
    )


@contextmanager
def _opened(path: str | Path, max_pixels: int) -> Iterator[tuple]:
    """Open a file's first video stream, bounded; FFmpeg's many exceptions inside the block become VideoError."""
    try:
        with open(path, "rb") as file:
            name = _container_format(path, file.read(256))
            file.seek(0)
            # A file object rather than a name: names that begin with a dash or hold a colon mean something to FFmpeg.
            with av.open(file, format=name, metadata_errors="replace") as container:
                if not container.streams.video:
                    raise VideoError(f"{path}: holds no video stream")
                stream = container.streams.video[0]
                codec = stream.codec_context
                if codec is None:
                    raise VideoError(f"{path}: its video codec is not known to this FFmpeg")
                if codec.width * codec.height > max_pixels:
                    raise VideoError(
                        f"{path}: {codec.width}x{codec.height} pixels per frame is over max_pixels={max_pixels}"
                    )
                codec.options = {"max_pixels": str(max_pixels)}
                codec.thread_type, codec.thread_count = (
                    "SLICE",
                    1,
                )  # frame threads hide truncation, and loaders bring their own
                yield container, stream
    except VideoError:
        raise
    except FileNotFoundError:
        raise VideoError(f"{path}: no such file") from None
    except _DECODE_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(f"{path}: cannot be decoded: {reason}") from error


@dataclass
class _Decoded:
    """How many frames the header promises (0: it does not say) and how many were decoded, returned or not."""

    promised: int
    frames: int = 0


def _pictures(
    path, container, stream, decoded: _Decoded, start: int, count: int | None, stride: int
) -> Iterator[np.ndarray]:
    """Yield the chosen frames of an opened stream as uint8 (H, W, 3), rotated as the file asks."""
    if start < 0 or stride < 1 or (count is not None and count < 1):
        raise VideoError(
            f"{path}: start={start}, count={count}, stride={stride}; need start >= 0, count >= 1, stride >= 1"
        )
    size, last = None, None if count is None else start + (count - 1) * stride
    convert = av.video.reformatter.VideoReformatter()  # one for all frames: setting it up costs more than a small frame
    for index, frame in enumerate(container.decode(stream)):
        decoded.frames = index + 1
        if index >= start and (index - start) % stride == 0:
            if frame.is_corrupt:
                raise VideoError(f"{path}: frame {index} is damaged")
            size = size or (frame.width, frame.height)
            if (frame.width, frame.height) != size:
                raise VideoError(f"{path}: the frame size changes at frame {index}; re-encode the file")
            # FFmpeg's rotation counts counter-clockwise, as rot90 does
            pixels = convert.reformat(frame, format="rgb24").to_ndarray()
            yield np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
        if index == last:
            return


def _check_promise(path, start: int, count: int | None, stride: int, got: int, decoded: _Decoded) -> None:
    """Refuse a decode that ended early in silence; headers that miscount by 2 frames or 2 % are common."""
    held, promised = decoded.frames, decoded.promised
    if count is not None and got < count:
        wanted = f"asked for {count} frames from frame {start}" + (f" at stride {stride}" if stride > 1 else "")
        raise ShortVideoError(f"{path}: {wanted}, but the video holds {held}", held)
    if count is None and held < promised - max(2, promised // 50):
        raise ShortVideoError(f"{path}: truncated: the header promises {promised} frames, {held} decode", held)
    if not got:
        raise ShortVideoError(f"{path}: holds {held} frames, none at or after frame {start}", held)


def _count_packets(container, stream) -> int:
    return sum(1 for packet in container.demux(stream) if packet.size)


def _fps(stream) -> float:
    return float(stream.average_rate or stream.base_rate or 25)


# Writing


def _encode(
    path: Path, target: str, frames: np.ndarray, fps: float, codec, quality: int, pixel_format: str, preset
) -> None:
    try:
        av.codec.Codec(codec, "w")
    except ValueError:
        raise VideoError(_missing_encoder(path, codec)) from None
    if "420" in pixel_format:
        height, width = frames.shape[1:3]
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    try:
        with av.open(target, "w") as container:
            stream = container.add_stream(codec, rate=_rational(fps), options=_encoder_options(codec, quality, preset))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt, stream.thread_count = pixel_format, 1
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())
    except _DECODE_ERRORS as error:
        raise VideoError(
            f"{path}: cannot be written with codec {codec!r}, pixel format {pixel_format!r}: {error}"
        ) from error


def _encoder_options(codec: str, quality: int, preset: str) -> dict[str, str]:
    if codec in ("libx264", "libx265"):
        return {
            "crf": str(quality),
            "preset": preset,
            **({"x265-params": "log-level=none"} if codec == "libx265" else {}),
        }
    if codec.startswith("libvpx"):
        return {"crf": str(quality), "b": "0"}
    quantiser = str(max(2, round(quality * 31 / 51)))  # the older codecs know a quantiser of 2 to 31 only
    return {"qmin": quantiser, "qmax": quantiser}


def _missing_encoder(path: Path, codec: str) -> str:
    present = []
    for name in _ENCODER_CHOICES:
        with suppress(ValueError):
            present.append(av.codec.Codec(name, "w").name)
    return (
        f"{path}: this FFmpeg has no encoder {codec!r}. Choose codec= one of "
        f"{', '.join(present) or 'none found'}, write a .gif (needs no encoder), "
        "or install the `av` wheel from PyPI, which brings libx264"
    )


def _rational(fps: float) -> Fraction:
    if not 0 < fps <= 1000:
        raise VideoError(f"fps must be in (0, 1000], not {fps}")
    return Fraction(fps).limit_denominator(1001)


def _write_gif(target: str, frames: np.ndarray, fps: float) -> None:
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in frames]
    # A GIF counts in hundredths of a second, and players slow down anything under two of them
    duration = max(20, round(100 / float(_rational(fps))) * 10)
    pictures[0].save(target, save_all=True, append_images=pictures[1:], duration=duration, loop=0, disposal=1)
