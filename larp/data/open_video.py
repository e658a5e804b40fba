"""Opens video files and .npy files of frames, without trusting them.

Only regular files are opened, because opening a pipe may block. The demuxer is chosen from the first bytes, so that
playlists, which open other files, are refused. The frame size is checked before decoding. Every failure is a
`VideoError` that names the file. Without PyAV only .npy files can be read.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from larp.data.stored_video import StoredVideo
from larp.files import as_url

import numpy as np

try:
    import av
    from av.stream import Disposition
except ImportError:  # optional: training on unpacked .npy frames does not need it
    av = None

MAX_BYTES = 8 * 2**30
"""Limit of the frames held in memory, in bytes."""
MAX_PIXELS = 4096 * 4096
"""Limit of the pixels of a frame."""
FRAMES_PER_SECOND = 25.0
"""Frame rate assumed for .npy files and for videos that state none."""

# The exceptions that PyAV raised in 9,600 decodes of mutated files.
DECODE_ERRORS = (
    *([av.error.FFmpegError] if av else ()),
    OSError,
    IndexError,
    UnicodeDecodeError,
    MemoryError,
    EOFError,
    ValueError,
    RuntimeError,
)
_HEAD = 1024
"""Bytes that tell the container: four packets of a transport stream."""
_MOTION_JPEG = (".mjpeg", ".mjpg")
"""Suffixes of JPEG pictures in a row that are the frames of a video; other JPEG files may hold a second picture, and show one."""
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"v=0")

# FFmpeg's own messages would break the progress bars; VideoError reports what matters.
if av:
    av.logging.set_level(av.logging.PANIC)


class VideoError(ValueError):
    """A video file that cannot be read or written; the message names the file and the reason."""


class NoPyAVError(VideoError):
    """A video file that cannot be read or written because PyAV is not installed."""


def has_pyav() -> bool:
    """Whether PyAV is installed, so that video files can be read and written."""
    return av is not None


def check_pyav(path: str | Path) -> None:
    """Raise NoPyAVError for `path` if PyAV is not installed."""
    if av is None:
        raise NoPyAVError(f"{path}: video files need PyAV: pip install av")


@contextmanager
def opened(path: str | Path | StoredVideo, max_pixels: int = MAX_PIXELS) -> Iterator[tuple]:
    """Open a video file; yields PyAV's container and its video stream.

    Exceptions of FFmpeg inside the block become VideoError, as do frames of more than `max_pixels` pixels.
    """
    try:
        with open_bytes(path) as file:
            check_pyav(path)
            name = _container_format(path, file.read(_HEAD))
            file.seek(0)
            with _container(file, name) as container:
                stream = _video_stream(path, container)
                codec = stream.codec_context
                if codec is None:
                    raise VideoError(f"{path}: its video codec is not known to this FFmpeg")
                if codec.width * codec.height > max_pixels:
                    raise VideoError(
                        f"{path}: {codec.width}x{codec.height} pixels per frame is over max_pixels={max_pixels}"
                    )
                codec.options = {"max_pixels": str(max_pixels)}
                # Frame threads hide truncation, and data loaders already use threads.
                codec.thread_type, codec.thread_count = "SLICE", 1
                yield container, stream
    except VideoError:
        raise
    except (FileNotFoundError, IsADirectoryError) as error:
        raise VideoError(not_there(path, error)) from None
    except DECODE_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(f"{path}: cannot be decoded: {reason}") from error


@contextmanager
def _container(file: BinaryIO, name: str) -> Iterator:
    """Yield PyAV's container of a file object, because FFmpeg interprets names that begin with a dash or contain a colon."""
    with av.open(file, format=name, metadata_errors="replace") as container:
        if name != "avi" or not _leads_astray(file, container):
            yield container
            return
    file.seek(0)
    with av.open(_Forward(file), format=name, metadata_errors="replace") as container:
        yield container


class _Forward:
    """A file that cannot be sought in, so that FFmpeg reads an AVI from the beginning to the end, and no index."""

    def __init__(self, file: BinaryIO):
        self.read = file.read


def _leads_astray(file: BinaryIO, container) -> bool:
    """Whether the index of an AVI names places at which no chunk of a stream begins, by a few of its entries."""
    place, astray = file.tell(), False
    for stream in container.streams.video[:1]:
        entries = stream.index_entries
        for number in {round(k * (len(entries) - 1) / 4) for k in range(5)} if entries else ():
            file.seek(max(0, entries[number].pos))
            astray |= re.match(rb"[0-9a-fA-F]{2}[a-z]", file.read(4)) is None
    file.seek(place)  # where FFmpeg goes on
    return astray


def _video_stream(path: str | Path, container):
    """Return the stream that FFmpeg ranks best, but no picture that is attached, such as the cover of an album."""
    videos = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    best = container.streams.best("video")
    if not videos:
        raise VideoError(f"{path}: holds no video stream" + (", only a picture beside the sound" if best else ""))
    return best if best in videos else videos[0]


def open_bytes(path: str | Path | StoredVideo) -> BinaryIO:
    """Open a file, if it is a regular one, or a stored video, for reading. Raises VideoError or OSError."""
    if isinstance(path, StoredVideo):
        return path.open()
    check_regular(path)
    return open(path, "rb")


def check_regular(path: str | Path) -> None:
    """Raise VideoError for a pipe, socket or device (opening a pipe may block), IsADirectoryError for a folder."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe (fifo)", stat.S_IFSOCK: "a socket"}
        found = kinds.get(stat.S_IFMT(mode), "a device")
        raise VideoError(f"{path}: is {found}, no file: write the video to a file, and give its name")


def not_there(path: str | Path, error: OSError) -> str:
    """Return the error message for a path at which there is no file."""
    if str(path) in ("", "."):  # Path("") is the current folder
        return f"no video was named ({str(path)!r}): give the name of a video file"
    if isinstance(error, IsADirectoryError):
        return f"{path}: is a folder: give the name of a video file in it"
    if url := as_url(path):
        return f"{url}: URLs are not opened: download the video, and give the name of the file"
    return f"{path}: no such file"


def _container_format(path: str | Path, head: bytes) -> str:
    """Return the name of FFmpeg's demuxer for a file's first bytes. Raises VideoError for playlists and unknown data."""
    if not head:
        raise VideoError(f"{path}: the file is empty")
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return "mov"
    if head[:4] == b"RIFF" and head[8:11] == b"AVI":
        return "avi"
    if head.startswith(b"\x89PNG\r\n\x1a\n") and b"acTL" in head:
        return "apng"
    for magic, name in (
        (b"\x1a\x45\xdf\xa3", "matroska"), (b"GIF8", "gif"), (b"FLV\x01", "flv"), (b"OggS", "ogg"), (b"DKIF", "ivf"),
        (b"\x30\x26\xb2\x75", "asf"), (b"\x00\x00\x01\xba", "mpeg"), (b"\x00\x00\x01\xb3", "mpegvideo"),
        (b"\x89PNG\r\n\x1a\n", "png_pipe"), (b"\xff\xd8\xff", "jpeg_pipe"),
    ):  # fmt: skip
        if head.startswith(magic):
            return "mjpeg" if name == "jpeg_pipe" and os.path.splitext(str(path))[1].lower() in _MOTION_JPEG else name
    if _is_transport_stream(head):
        return "mpegts"
    if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(_PLAYLISTS):
        raise VideoError(f"{path}: is a playlist, which may open other files; give the video files themselves")
    raise VideoError(
        f"{path}: does not begin like a video file (mp4, mov, avi, mkv, webm, gif, flv, ogg, ivf, wmv, mpeg) "
        "or a picture (png, jpeg)"
    )


def _is_transport_stream(head: bytes) -> bool:
    """Whether bytes are packets of an MPEG transport stream: of 188 bytes, or 192 (camcorders, Blu-ray) or 204 (receivers).

    A recording may begin inside a packet.
    """
    return any(
        all(head[first + k * size : first + k * size + 1] == b"\x47" for k in range(3))
        for size in (188, 192, 204)
        for first in range(size)
    )


def is_frame_file(path: str | Path | StoredVideo) -> bool:
    """Whether a path names an .npy file of frames."""
    return not isinstance(path, StoredVideo) and Path(path).suffix.lower() == ".npy"


def open_frames(path: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Memory-map an .npy file of uint8 (T, H, W, 3) frames, read-only.

    Raises VideoError for any other contents, including truncated files and pickled objects.
    """
    try:
        check_regular(path)
        frames = np.load(path, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise VideoError(not_there(path, error)) from None
    except VideoError:
        raise
    except Exception as error:  # numpy evaluates the header as Python literals: a damaged one raises many types
        raise VideoError(f"{path}: is no .npy file of frames, or a damaged one: {_first_line(error)}") from error
    if not isinstance(frames, np.ndarray):
        frames.close()
        raise VideoError(f"{path}: is an archive of arrays, not an .npy file of frames")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise VideoError(f"{path}: holds {frames.dtype} {frames.shape}; frames are uint8 (T, H, W, 3), T, H and W > 0")
    height, width = frames.shape[1:3]
    if height * width > max_pixels:
        raise VideoError(f"{path}: {width}x{height} pixels per frame is over max_pixels={max_pixels}")
    return frames


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
