"""Video inputs (files, Videos, uint8 frames, float clips) -> clips of a tokenizer's size, or all frames of a video."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from larp.data.clips import clip_to_frames, frames_to_clip, resize_frames
from larp.data.video import (
    ShortVideoError,
    VideoError,
    check_fps,
    frame_times,
    iter_frames,
    probe,
    read_clip,
)
from larp.models.tokenizer import LarpTokenizer
from larp_mllm.video import Video

import numpy as np
import torch
from torch import Tensor

# Frames of a whole file that are resized at a time.
_CHUNK = 32

VideoInput = str | Path | Video | np.ndarray | Tensor


def read_frames(video: VideoInput, num_frames: int, stride: int) -> np.ndarray | Tensor:
    """A file or a Video -> frames uint8 (T, H, W, 3); arrays and tensors are returned unchanged.

    Of a file, `num_frames` frames are read around its middle, every `stride`-th. Raises VideoError for a file that cannot
    be read, ShortVideoError for one with too few frames.
    """
    if isinstance(video, Video):
        return video.frames
    if not isinstance(video, (str, Path)):
        return video
    span = (num_frames - 1) * stride + 1
    times = frame_times(video)
    try:
        first = times.window(max(0, times.count - span) // 2, span)
        return read_clip(video, first, num_frames, stride)
    except ShortVideoError as error:
        if error.frames >= span:  # damaged: fewer frames decode
            return read_clip(video, (error.frames - span) // 2, num_frames, stride)
        at = f" at stride {stride} (a span of {span})" if stride > 1 else ""
        raise ShortVideoError(
            f"{video}: has {error.frames} frames, the model reads {num_frames}{at}: give a longer video",
            error.frames,
        ) from error


def to_clip(video: np.ndarray | Tensor, tokenizer: LarpTokenizer) -> Tensor:
    """uint8 frames (T, H, W, 3), or a float clip (3, T, H, W) in [0, 1] -> float32 clip of the tokenizer's size.

    Frames are resized, and of a longer video the middle is taken; a clip is not changed. Raises ValueError for other
    shapes, dtypes or ranges.
    """
    config = tokenizer.config
    pixels = video.detach().cpu() if isinstance(video, Tensor) else torch.from_numpy(_to_array(video))
    if pixels.is_floating_point() and pixels.ndim == 4 and pixels.shape[0] == 3:
        tokenizer.check_clip(pixels[None])
        return pixels.float()
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise ValueError(_type_error(f"{str(pixels.dtype).removeprefix('torch.')} {tuple(pixels.shape)}"))
    frames = pixels.numpy()
    if len(frames) < config.num_frames:
        raise ValueError(
            f"the video has {len(frames)} frames, the video tokenizer reads {config.num_frames}: give a longer one"
        )
    start = (len(frames) - config.num_frames) // 2
    return frames_to_clip(frames[start : start + config.num_frames], config.height, config.width)


def read_whole_video(video: Any, height: int, width: int, stride: int, fps: float) -> tuple[np.ndarray, float]:
    """All frames of a video, uint8 (T, height, width, 3), and their frames per second.

    Of a file every `stride`-th frame is read, the last one included, at its rate / stride. A Video keeps its rate; uint8
    frames (T, H, W, 3) and a float clip (3, T, height, width) in [0, 1] get `fps`. Frames are resized and cropped as in
    training; a clip is not changed. Raises VideoError for a file that cannot be read, ValueError for other types.
    """
    if isinstance(video, (str, Path)):
        return _read_whole_file(Path(video), height, width, stride)
    if isinstance(video, Video):
        return resize_frames(video.frames, height, width), video.fps
    if isinstance(video, Tensor):
        video = video.detach().cpu()
        video = video.float() if video.is_floating_point() else video  # numpy has no bfloat16
    pixels = _to_array(video)
    if pixels.ndim == 4 and pixels.shape[0] == 3 and np.issubdtype(pixels.dtype, np.floating):
        if not (pixels.size and pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError("a float clip (3, T, H, W) must hold values in [0, 1]: scale or clamp it")
        if pixels.shape[2:] != (height, width):
            raise ValueError(
                f"a float clip must be (3, T, {height}, {width}), got {pixels.shape}: give uint8 frames, which are resized"
            )
        pixels = clip_to_frames(torch.from_numpy(np.ascontiguousarray(pixels)))
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise ValueError(_type_error(f"{pixels.dtype} {pixels.shape}" if pixels.ndim else repr(video)))
    return resize_frames(pixels, height, width), fps


def as_list(videos: Any) -> list:
    """Several videos as a list. Raises ValueError for a single video and for other types."""
    if isinstance(videos, (str, Path, Video)) or not isinstance(videos, Iterable):
        raise ValueError(f"videos must be a list, got {str(videos)[:60]!r}: for one video give a list of one")
    return list(videos)


def group_videos(videos: Any, text: str | Sequence[str]) -> list[Sequence]:
    """The videos of each text; all of them for a single text. None: no videos. Raises ValueError unless each text has a list."""
    videos = [] if videos is None else as_list(videos)
    if isinstance(text, str):
        return [videos]
    if not videos:
        return [[] for _ in text]
    if len(videos) != len(text) or not all(isinstance(group, (list, tuple)) for group in videos):
        raise ValueError(
            f"{len(text)} texts need a list of {len(text)} lists of videos, one for each text (empty where it has none)"
        )
    return videos


def _to_array(video: Any) -> np.ndarray:
    """`video` as an array of uint8 or floats, of any shape. Raises ValueError for other types."""
    try:
        array = np.asarray(video)
        known = array.dtype == np.uint8 or np.issubdtype(array.dtype, np.floating)
    except ValueError as error:  # frames of different sizes
        raise ValueError(_type_error(str(error))) from error
    if not known:
        raise ValueError(_type_error(f"{array.dtype} {array.shape}" if array.ndim else repr(video)))
    return np.require(array, requirements=("C", "W"))  # torch.from_numpy needs both


def _type_error(found: str) -> str:
    """The message for an input that is no video."""
    return (
        "a video must be uint8 frames (T, H, W, 3) of 0..255, or a float clip (3, T, H, W) in [0, 1], "
        f"got {found}: convert it"
    )


def _read_whole_file(path: Path, height: int, width: int, stride: int) -> tuple[np.ndarray, float]:
    # Resized while reading, since all frames of a large file may not fit into memory. All are resized, since only at the
    # end it is known which ones are selected: the last frame must be one of them.
    rate, pending, resized = _rate(path, stride), [], []
    for frame in iter_frames(path):
        pending.append(frame)
        if len(pending) == _CHUNK:
            resized.append(resize_frames(np.stack(pending), height, width))
            pending = []
    if pending:
        resized.append(resize_frames(np.stack(pending), height, width))
    if not resized:
        raise VideoError(f"{path}: holds no video frame")
    frames = np.concatenate(resized)
    return frames[(len(frames) - 1) % stride :: stride], rate


def _rate(path: Path, stride: int) -> float:
    """The rate of every `stride`-th frame of a file, checked before sampling, since the result is saved at this rate."""
    rate = probe(path).fps / stride
    try:
        return check_fps(rate)
    except VideoError as error:
        raise VideoError(f"{path}: its {error}: convert the video to another rate") from None
