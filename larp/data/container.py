"""Opening video files, every one treated as hostile: only regular files are opened (a pipe would be waited for without
end), the demuxer is chosen from the file's first bytes (so playlists, which open other files, are refused), the picture
size is checked before a frame is decoded, and every failure is a `VideoError` that names the file.

PyAV may be missing: then no video file is read or written, and everything else works.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from larp.files import as_url

import numpy as np

try:
    import av
except ImportError:  # a machine that trains on unpacked frames alone
    av = None

MAX_BYTES = 8 * 2**30
MAX_PIXELS = 4096 * 4096

# What PyAV raises on mutated files, measured on 9,600 decodes (OSError covers EOFError's FFmpeg twin and
# PermissionError).
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
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"v=0")

# FFmpeg's own lines would tear the progress bars; what matters reaches VideoError.
if av:
    av.logging.set_level(av.logging.PANIC)


class VideoError(ValueError):
    """A video file that cannot be read or written; the message names the file and the reason."""


class NoPyAVError(VideoError):
    """A video file that cannot be read or written because PyAV is not installed."""


def has_pyav() -> bool:
    """Whether video files can be read and written here."""
    return av is not None


def check_pyav(path: str | Path) -> None:
    """NoPyAVError where a video file cannot be read or written for want of PyAV."""
    if av is None:
        raise NoPyAVError(f"{path}: video files need PyAV: pip install av")


@contextmanager
def opened(path: str | Path, max_pixels: int = MAX_PIXELS) -> Iterator[tuple]:
    """Open a file: PyAV's container and its first video stream, whose pictures are bounded.

    FFmpeg's many exceptions inside the block become VideoError.
    """
    try:
        check_regular(path)
        with open(path, "rb") as file:
            check_pyav(path)
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
                # Frame threads hide truncation, and loaders bring their own.
                codec.thread_type, codec.thread_count = "SLICE", 1
                yield container, stream
    except VideoError:
        raise
    except (FileNotFoundError, IsADirectoryError) as error:
        raise VideoError(not_there(path, error)) from None
    except DECODE_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(f"{path}: cannot be decoded: {reason}") from error


def check_regular(path: str | Path) -> None:
    """VideoError for what is there but no file; opening a pipe without a writer would wait for ever."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe (fifo)", stat.S_IFSOCK: "a socket"}
        found = kinds.get(stat.S_IFMT(mode), "a device")
        raise VideoError(f"{path}: is {found}, no file: write the video to a file, and give its name")


def not_there(path: str | Path, error: OSError) -> str:
    """What to say of a name that is no file."""
    if str(path) in ("", "."):  # a Path of nothing is the current folder
        return f"no video was named ({str(path)!r}): give the name of a video file"
    if isinstance(error, IsADirectoryError):
        return f"{path}: is a folder: give the name of a video file in it"
    if url := as_url(path):
        return f"{url}: URLs are not opened: download the video, and give the name of the file"
    return f"{path}: no such file"


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
        (b"\x89PNG\r\n\x1a\n", "png_pipe"), (b"\xff\xd8\xff", "jpeg_pipe"),
    ):  # fmt: skip
        if head.startswith(magic):
            return name
    if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(_PLAYLISTS):
        raise VideoError(f"{path}: is a playlist, which may open other files; give the video files themselves")
    raise VideoError(
        f"{path}: does not begin like a video file (mp4, mov, avi, mkv, webm, gif, flv, ogg, ivf, wmv, mpeg) "
        "or a picture (png, jpeg)"
    )


FRAMES_PER_SECOND = 25.0
"""The frame rate of every such file: the format holds none."""


def is_frame_file(path: str | Path) -> bool:
    """Whether a name is that of a file of frames."""
    return Path(path).suffix.lower() == ".npy"


def open_frames(path: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Map an .npy file: read-only uint8 (T, H, W, 3) frames, read from the disk as they are used.

    VideoError for everything else, a cut file and one with pickled objects among it.
    """
    try:
        check_regular(path)
        frames = np.load(path, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise VideoError(not_there(path, error)) from None
    except VideoError:
        raise
    except Exception as error:  # numpy parses the header as Python, so a damaged one may raise nearly anything
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
