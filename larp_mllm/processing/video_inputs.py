"""What counts as a video, and as several: files, Videos, uint8 frames, float clips -> clips of a tokenizer's size."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from larp.data.clips import clip_to_frames, resize_frames
from larp.data.video import VideoError, check_fps, iter_frames, probe
from larp.models.tokenizer import LarpTokenizer
from larp_mllm.video import Video

import numpy as np
import torch
from torch import Tensor

Videos = str | Path | Video | np.ndarray | Tensor


def listed(videos: Any) -> list:
    """Several videos as a list; ValueError for a single one, and for what is no list."""
    if isinstance(videos, (str, Path, Video)) or not isinstance(videos, Iterable):
        raise ValueError(f"videos must be a list of them, got {str(videos)[:60]!r}: for one give a list of one")
    return list(videos)


def grouped(videos: Any, text: str | Sequence[str]) -> list[Sequence]:
    """The videos of each text, of a single one all; None means no videos. ValueError unless each text has a list."""
    videos = [] if videos is None else listed(videos)
    if isinstance(text, str):
        return [videos]
    if not videos:
        return [[] for _ in text]
    if len(videos) != len(text) or not all(isinstance(group, (list, tuple)) for group in videos):
        raise ValueError(
            f"{len(text)} texts need a list of {len(text)} lists of videos, one for each text (empty where it has none)"
        )
    return videos


def to_frames(video: Videos, num_frames: int, stride: int) -> np.ndarray | Tensor:
    """A file or a Video -> its frames, uint8 (T, H, W, 3), of a file every `stride`-th around its middle; other videos
    as they are. Raises VideoError for a file that cannot be read, ShortVideoError for one of too few frames.
    """
    if isinstance(video, Video):
        return video.frames
    if not isinstance(video, (str, Path)):
        return video
    from larp.data.video import ShortVideoError, count_frames, read_video

    span = (num_frames - 1) * stride + 1
    held = count_frames(video)
    try:
        return read_video(video, max(0, held - span) // 2, num_frames, stride)[0]
    except ShortVideoError as error:
        if error.frames >= span:  # the header had promised more
            return read_video(video, (error.frames - span) // 2, num_frames, stride)[0]
        reach = f" at stride {stride} (which reach over {span})" if stride > 1 else ""
        raise ShortVideoError(
            f"{video}: has {error.frames} frames, the model reads {num_frames}{reach}: give a longer video",
            error.frames,
        ) from error


def to_clip(video: np.ndarray | Tensor, tokenizer: LarpTokenizer) -> Tensor:
    """uint8 frames (T, H, W, 3), or a float clip (3, T, H, W) in [0, 1] -> float32 clip of the tokenizer's size.

    Frames are resized and of a longer video the middle is read, a clip is taken as it is. ValueError for other shapes,
    dtypes or ranges.
    """
    from larp.data.clips import frames_to_clip

    config = tokenizer.config
    pixels = video.detach().cpu() if isinstance(video, Tensor) else torch.from_numpy(to_array(video))
    if pixels.is_floating_point() and pixels.ndim == 4 and pixels.shape[0] == 3:
        tokenizer.check_clip(pixels[None])
        return pixels.float()
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise ValueError(not_a_video(f"{str(pixels.dtype).removeprefix('torch.')} {tuple(pixels.shape)}"))
    frames = pixels.numpy()
    if len(frames) < config.num_frames:
        raise ValueError(
            f"the video has {len(frames)} frames, the video tokenizer reads {config.num_frames}: give a longer one"
        )
    start = (len(frames) - config.num_frames) // 2
    return frames_to_clip(frames[start : start + config.num_frames], config.height, config.width)


def to_array(video: Any) -> np.ndarray:
    """The array of uint8 or floats that `video` is, of any shape; ValueError if it is none."""
    try:
        array = np.asarray(video)
        known = array.dtype == np.uint8 or np.issubdtype(array.dtype, np.floating)
    except ValueError as error:  # frames of different sizes
        raise ValueError(not_a_video(str(error))) from error
    if not known:
        raise ValueError(not_a_video(f"{array.dtype} {array.shape}" if array.ndim else repr(video)))
    return np.require(array, requirements=("C", "W"))  # as torch shares it


def not_a_video(found: str) -> str:
    """What to say of a video that is something else."""
    return (
        "a video must be uint8 frames (T, H, W, 3) of 0..255, or a float clip (3, T, H, W) in [0, 1], "
        f"got {found}: convert it"
    )


_CHUNK = 32


def all_frames(video: Any, height: int, width: int, stride: int, fps: float) -> tuple[np.ndarray, float]:
    """All frames of a video, uint8 (T, height, width, 3), and their frames per second.

    Of a file every `stride`-th frame, so that the last one is there, at its rate / stride. A Video keeps its rate;
    uint8 frames (T, H, W, 3) and a float clip (3, T, height, width) in [0, 1] have `fps`. Frames of another size are
    resized and cropped as in training; a clip is taken as it is, as `to_clip` does. Raises VideoError for a file,
    ValueError for what is no video.
    """
    if isinstance(video, (str, Path)):
        return _file(Path(video), height, width, stride)
    if isinstance(video, Video):
        return resize_frames(video.frames, height, width), video.fps
    if isinstance(video, Tensor):
        video = video.detach().cpu()
        video = video.float() if video.is_floating_point() else video  # numpy has no bfloat16
    pixels = to_array(video)
    if pixels.ndim == 4 and pixels.shape[0] == 3 and np.issubdtype(pixels.dtype, np.floating):
        if not (pixels.size and pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError("a float clip (3, T, H, W) must hold values in [0, 1]: divide by the largest, or clamp it")
        if pixels.shape[2:] != (height, width):
            raise ValueError(
                f"a float clip must be (3, T, {height}, {width}), got {pixels.shape}: give uint8 frames, which are resized"
            )
        pixels = clip_to_frames(torch.from_numpy(np.ascontiguousarray(pixels)))
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise ValueError(not_a_video(f"{pixels.dtype} {pixels.shape}" if pixels.ndim else repr(video)))
    return resize_frames(pixels, height, width), fps


def _file(path: Path, height: int, width: int, stride: int) -> tuple[np.ndarray, float]:
    # Made small as they come, since a long file of large pictures would not fit into memory. Which frames count is known
    # only at the end: the last one must be among them. So `stride` series are kept, or one where all count.
    rate, waiting, kept = _rate(path, stride), [], []
    for frame in iter_frames(path):
        waiting.append(frame)
        if len(waiting) == _CHUNK:
            kept.append(resize_frames(np.stack(waiting), height, width))
            waiting = []
    if waiting:
        kept.append(resize_frames(np.stack(waiting), height, width))
    if not kept:
        raise VideoError(f"{path}: holds no video frame")
    frames = np.concatenate(kept)
    return frames[(len(frames) - 1) % stride :: stride], rate


def _rate(path: Path, stride: int) -> float:
    """The rate of every `stride`-th frame of a file; checked now, for the long work that follows ends in a file."""
    rate = probe(path).fps / stride
    try:
        return check_fps(rate)
    except VideoError as error:
        raise VideoError(f"{path}: its {error}: convert the video to another rate") from None
