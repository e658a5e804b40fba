"""What users give as a video, whole: files, Videos and arrays -> frames of one size, and their rate."""

from pathlib import Path
from typing import Any

from larp.data.clips import clip_to_frames, resize_frames
from larp.data.video import VideoError, check_fps, iter_frames, probe
from larp_mllm.video import Video
from larp_mllm.video_input import not_a_video, to_array

import numpy as np
import torch
from torch import Tensor

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
