"""Frames that lie uncompressed in an .npy file: a video that numpy alone reads, as `larp-mllm unpack-clips` writes it."""

from __future__ import annotations

from pathlib import Path

from larp.data.container import MAX_PIXELS, VideoError, check_regular, not_there

import numpy as np

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
