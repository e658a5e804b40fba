"""Video inputs of any kind -> clips of a tokenizer's size, or all frames of a video.

Readers and frames of other packages are known by what they offer, so that none is imported: torchcodec's VideoDecoder (`len`,
`get_frames_at`), its Frame and FrameBatch (`data`, a tensor), decord's VideoReader (`len`, `get_batch`) and its arrays
(`asnumpy`), PyAV's frames (`to_rgb`, `to_ndarray`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from PIL import Image
from torch import Tensor

# Frames of a whole file that are resized at a time.
_CHUNK = 32

VideoInput = str | Path | Video | np.ndarray | Tensor | Sequence | Any
"""A file, a Video, uint8 frames (T, H, W, 3) or (T, 3, H, W), a float clip (3, T, H, W) in [0, 1], a list or an
iterator of frames (PIL images, arrays, tensors, PyAV's), or a reader or frames of torchcodec or decord."""


def read_frames(video: VideoInput, num_frames: int, stride: int) -> Tensor:
    """A video -> uint8 frames (T, H, W, 3), or a float32 clip (3, T, H, W).

    Of a file or a reader, `num_frames` frames are read around its middle, every `stride`-th. Raises VideoError for a file that
    cannot be read, ShortVideoError for one with too few frames, ValueError as `to_pixels`.
    """
    if not isinstance(video, (str, Path)) and not _is_reader(video):
        return to_pixels(video)
    span = (num_frames - 1) * stride + 1
    try:
        if not isinstance(video, (str, Path)):
            first = (len(video) - span) // 2
            if first < 0:
                raise ShortVideoError("", len(video))
            return _read(video, range(first, first + span, stride))
        times = frame_times(video)
        try:
            first = times.window(max(0, times.count - span) // 2, span)
            return torch.from_numpy(read_clip(video, first, num_frames, stride))
        except ShortVideoError as error:
            if error.frames < span:
                raise
            # Damaged: fewer frames decode.
            return torch.from_numpy(read_clip(video, (error.frames - span) // 2, num_frames, stride))
    except ShortVideoError as error:
        at = f" at stride {stride} (a span of {span})" if stride > 1 else ""
        name = video if isinstance(video, (str, Path)) else f"the {type(video).__name__}"
        raise ShortVideoError(
            f"{name}: has {error.frames} frames, the model reads {num_frames}{at}: give a longer video", error.frames
        ) from error


def to_pixels(video: VideoInput) -> Tensor:
    """Frames in memory -> uint8 (T, H, W, 3), or a float32 clip (3, T, H, W), on the CPU.

    Frames (T, 3, H, W) are told apart by their axis of 3. Raises ValueError for other shapes and dtypes, and for frames that
    may be either.
    """
    if isinstance(video, Video):
        return video.torch()
    video = _listed(video)
    if isinstance(video, (list, tuple)) and video and all(isinstance(frame, Image.Image) for frame in video):
        return torch.from_numpy(_stack([np.asarray(image.convert("RGB")) for image in video]))
    if isinstance(video, (list, tuple)) and any(map(_is_frame, video)):
        video = _stack([_frame_array(frame) for frame in video])
    video = _unwrap(video)
    pixels = video.detach().cpu() if isinstance(video, Tensor) else torch.from_numpy(_to_array(video))
    if pixels.is_floating_point() and pixels.ndim == 4 and pixels.shape[0] == 3:
        return pixels.float()
    if pixels.dtype == torch.uint8 and pixels.ndim == 4 and 0 not in pixels.shape:
        colours = [axis for axis in (1, 3) if pixels.shape[axis] == 3]
        if len(colours) == 2:
            raise ValueError(
                f"uint8 frames {tuple(pixels.shape)} may be (T, H, W, 3) or (T, 3, H, W), since both axes have size 3: give "
                "larp_mllm.Video(frames, fps), whose frames are (T, H, W, 3)"
            )
        if colours:
            return pixels if colours == [3] else pixels.permute(0, 2, 3, 1)
    raise ValueError(_type_error(f"{str(pixels.dtype).removeprefix('torch.')} {tuple(pixels.shape)}"))


def to_clip(pixels: Tensor, tokenizer: LarpTokenizer) -> Tensor:
    """uint8 frames (T, H, W, 3), or a float clip (3, T, H, W) in [0, 1] -> float32 clip of the tokenizer's size.

    Frames are resized, and of a longer video the middle is taken; a clip is not changed. Raises ValueError for a clip of
    another shape or range, and for fewer frames.
    """
    config = tokenizer.config
    if pixels.is_floating_point():
        return tokenizer.check_clip(pixels[None])[0]
    frames = pixels.numpy()
    if len(frames) < config.num_frames:
        raise ValueError(
            f"the video has {len(frames)} frames, the video tokenizer reads {config.num_frames}: give a longer one"
        )
    start = (len(frames) - config.num_frames) // 2
    return frames_to_clip(frames[start : start + config.num_frames], config.height, config.width)


def read_whole_video(video: VideoInput, height: int, width: int, stride: int, fps: float) -> tuple[np.ndarray, float]:
    """All frames of a video, uint8 (T, height, width, 3), and their frames per second.

    Of a file or a reader every `stride`-th frame is read, the last one included, at its rate / stride. A Video keeps its rate;
    frames and a float clip (3, T, height, width) in [0, 1], which have none, get `fps`. Frames are resized and cropped as in
    training; a clip is not changed. Raises VideoError for a file that cannot be read, ValueError as `to_pixels`.
    """
    if isinstance(video, (str, Path)):
        return _read_whole_file(Path(video), height, width, stride)
    if _is_reader(video):
        return _read_whole_reader(video, height, width, stride, fps)
    pixels = to_pixels(video)
    if pixels.is_floating_point():
        if not (pixels.numel() and pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError("a float clip (3, T, H, W) must hold values in [0, 1]: scale or clamp it")
        if tuple(pixels.shape[2:]) != (height, width):
            raise ValueError(
                f"a float clip must be (3, T, {height}, {width}), got {tuple(pixels.shape)}: give uint8 frames, which are "
                "resized"
            )
        return clip_to_frames(pixels), fps
    return resize_frames(pixels.numpy(), height, width), video.fps if isinstance(video, Video) else fps


def is_video(value: Any) -> bool:
    """Whether `value` is one video rather than several: its type or number of axes says so."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_is_frame, value))
    if isinstance(value, (str, Path, Video)) or _is_reader(value):
        return True
    value = _unwrap(value)
    return isinstance(value, (np.ndarray, Tensor)) and value.ndim == 4


def as_list(videos: Any) -> list:
    """Several videos as a list. Raises ValueError for a single video and for other types."""
    videos = _listed(videos)
    if is_video(videos) or not isinstance(videos, Iterable):
        raise ValueError(f"videos must be a list, got {str(videos)[:60]!r}: for one video give a list of one")
    return list(videos)


def group_videos(videos: Any, text: str | Sequence[str]) -> list[Sequence]:
    """The videos of each text; all of them for a single text, one of which needs no list. None: no videos.

    Raises ValueError unless each of several texts has a list.
    """
    videos = _listed(videos)
    if is_video(videos) and (isinstance(text, str) or len(text) == 1):
        return [[videos]]
    videos = [] if videos is None else as_list(videos)
    if isinstance(text, str):
        return [videos]
    if not videos:
        return [[] for _ in text]
    if len(videos) != len(text) or not all(isinstance(group, (list, tuple)) for group in videos):
        raise ValueError(
            f"{len(text)} texts need a list of {len(text)} lists of videos, one for each text (empty where it has none)"
        )
    return [[group] if is_video(group) else group for group in videos]


def _listed(value: Any) -> Any:
    """An iterator, such as a generator of frames or of videos, as a list; anything else unchanged."""
    return list(value) if isinstance(value, Iterator) and not _is_reader(value) else value


def _is_reader(value: Any) -> bool:
    """Whether `value` is like torchcodec's VideoDecoder or decord's VideoReader: it has a length and gives frames by index."""
    if isinstance(value, (str, bytes, Sequence, Mapping, Tensor, Video)) or hasattr(value, "__array__"):
        return False
    if isinstance(_unwrap(value), (Tensor, np.ndarray)) or not hasattr(value, "__len__"):
        return False
    return any(hasattr(value, name) for name in ("get_batch", "get_frames_at", "__getitem__"))


def _read(reader: Any, indices: Sequence[int]) -> Tensor:
    """Frames of a reader, uint8 (len(indices), H, W, 3)."""
    many = getattr(reader, "get_batch", None) or getattr(reader, "get_frames_at", None)
    try:
        frames = many(list(indices)) if many else [reader[index] for index in indices]
    except Exception as error:  # its type depends on the package
        raise VideoError(
            f"the {type(reader).__name__} gives no frames {indices[0]} to {indices[-1]}: {error}"
        ) from error
    return to_pixels(frames)


def _read_whole_reader(reader: Any, height: int, width: int, stride: int, fps: float) -> tuple[np.ndarray, float]:
    rate = getattr(getattr(reader, "metadata", None), "average_fps", None)
    rate = reader.get_avg_fps() if rate is None and hasattr(reader, "get_avg_fps") else rate
    indices = range((len(reader) - 1) % stride, len(reader), stride) if len(reader) else ()
    if not indices:
        raise VideoError(f"the {type(reader).__name__} holds no video frame")
    chunks = [_read(reader, indices[first : first + _CHUNK]) for first in range(0, len(indices), _CHUNK)]
    frames = np.concatenate([resize_frames(chunk.numpy(), height, width) for chunk in chunks])
    return frames, fps if rate is None else check_fps(rate / stride)


def _unwrap(value: Any) -> Any:
    """The tensor or array inside of an object of torchcodec, decord or PyAV; anything else unchanged."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value
    if _is_av(value):
        return value.to_ndarray(format="rgb24")
    if hasattr(value, "asnumpy"):
        return value.asnumpy()
    data = getattr(value, "data", None)
    return data if isinstance(data, Tensor) else value


def _is_av(value: Any) -> bool:
    return hasattr(value, "to_rgb") and hasattr(value, "to_ndarray")


def _is_frame(value: Any) -> bool:
    if _is_av(value):
        return True
    value = _unwrap(value)
    if isinstance(value, (np.ndarray, Tensor)):
        return value.ndim == 3 and 3 in (value.shape[0], value.shape[2])
    return isinstance(value, Image.Image)


def _frame_array(frame: Any) -> np.ndarray:
    if isinstance(frame, Image.Image):
        return np.asarray(frame.convert("RGB"))
    frame = _unwrap(frame)
    if isinstance(frame, Tensor):
        frame = frame.detach().cpu()
        return (frame.float() if frame.is_floating_point() else frame).numpy()  # numpy has no bfloat16
    return np.asarray(frame)


def _stack(frames: list[np.ndarray]) -> np.ndarray:
    try:
        return np.stack(frames)
    except ValueError as error:
        shapes = sorted({frame.shape for frame in frames})
        raise ValueError(_type_error(f"frames of the shapes {', '.join(map(str, shapes[:4]))}")) from error


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
        "a video must be uint8 frames (T, H, W, 3) or (T, 3, H, W) of 0..255, or a float clip (3, T, H, W) in [0, 1], "
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
