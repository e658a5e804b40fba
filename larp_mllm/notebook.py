"""How a Video shows itself in a notebook: a playable MP4 in the page, else a GIF, else a contact sheet; of bounded size."""

import base64
import html
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from larp.data.clips import contact_sheet, scale_frames
from larp.data.video import VideoError, write_video

import numpy as np

if TYPE_CHECKING:
    from larp_mllm.video import Video

# A notebook keeps what it shows: a side of a picture, frames and bytes are bounded.
_LEAST_HEIGHT, _LARGEST_SIDE = 256, 512
_MOST_FRAMES = 600
_MOST_BYTES = 4 * 2**20


def to_html(video: "Video") -> str:
    """The video as HTML that holds it, tiny pictures enlarged; longer ones are cut, with a note. Never raises."""
    try:
        return _figure(video)
    except Exception as error:  # whatever it is, a cell's value must show as something
        return f"<pre>{html.escape(f'{video!r} cannot be shown here: {type(error).__name__}: {error}')}</pre>"


def _figure(video: "Video") -> str:
    count, height, width = video.frames.shape[:3]
    shown = _sized(video.frames[:_MOST_FRAMES])
    note = "" if count <= _MOST_FRAMES else f"; the first {_MOST_FRAMES} are shown, .save writes all"
    size = f"{count} frames of {width}x{height} at {video.fps:g} fps{note}"
    caption = " · ".join(html.escape(text) for text in (video.prompt, size) if text)
    return f"<figure style='margin:0'>{_picture(shown, video)}<figcaption>{caption}</figcaption></figure>"


def _picture(frames: np.ndarray, video: "Video") -> str:
    side = f'width="{frames.shape[2]}" height="{frames.shape[1]}"'
    with tempfile.TemporaryDirectory() as folder:
        for name, media, element in (
            ("x.mp4", "video/mp4", f'<video {side} controls loop autoplay muted playsinline src="{{}}"></video>'),
            ("x.gif", "image/gif", f'<img {side} src="{{}}">'),
        ):
            path = Path(folder, name)
            try:
                write_video(path, frames, video.fps)
            except VideoError:  # no encoder; a GIF needs none
                continue
            if path.stat().st_size <= _MOST_BYTES:
                return element.format(_data(path, media))
        path = Path(folder, "x.png")
        contact_sheet([frames], [""], path, cell=160, given=video.given)
        return f'<img src="{_data(path, "image/png")}">'


def _data(path: Path, media: str) -> str:
    return f"data:{media};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _sized(frames: np.ndarray) -> np.ndarray:
    """Each pixel repeated until a tiny video can be seen, or a large one made smaller; even sides, as MP4 wants them."""
    height, width = frames.shape[1:3]
    longest = max(height, width)
    factor = min(math.ceil(_LEAST_HEIGHT / height), _LARGEST_SIDE // longest)
    if factor > 1:
        return frames.repeat(factor, axis=1).repeat(factor, axis=2)
    if longest <= _LARGEST_SIDE:
        return frames
    scale = _LARGEST_SIDE / longest
    return scale_frames(frames, *(max(2, 2 * round(side * scale / 2)) for side in (height, width)))
