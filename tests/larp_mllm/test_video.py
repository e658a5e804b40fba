"""A Video in a notebook: the page holds something that plays, of bounded size, whatever the video is."""

import base64
import io
import re

import larp.data.video
from larp.data.video import VideoError
from larp_mllm import notebook
from larp_mllm.video import Video

import av
import numpy as np
import pytest
from PIL import Image


def noise(count: int, height: int, width: int, fps: float = 8.0, prompt: str = "") -> Video:
    frames = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return Video(frames, fps, prompt)


def held(html: str) -> tuple[str, bytes]:
    """The media type and bytes of the one file that the HTML holds."""
    (found,) = re.findall(r'src="data:([a-z0-9/]+);base64,([A-Za-z0-9+/=]+)"', html)
    return found[0], base64.b64decode(found[1], validate=True)


def decoded(data: bytes) -> tuple[list[np.ndarray], float]:
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return frames, float(container.streams.video[0].average_rate)


def test_a_notebook_gets_a_video_that_plays_and_can_be_seen():
    video = noise(7, 16, 24, fps=6.0)
    html = video._repr_html_()
    media, data = held(html)
    frames, rate = decoded(data)
    assert media == "video/mp4" and "<video" in html and "controls" in html and "loop" in html
    assert len(frames) == 7 and rate == 6.0 and frames[0].shape == (256, 384, 3)
    assert 'width="384" height="256"' in html
    # Each pixel became a square of its colour.
    small = np.stack(frames)[:, 8::16, 8::16].astype(int)
    assert np.abs(small - video.frames).mean() < 40


@pytest.mark.parametrize("size, shown", [((100, 1000), (52, 512)), ((301, 201), (301, 201)), ((5, 3), (260, 156))])
def test_large_videos_become_smaller_and_none_is_stretched(size, shown):
    _, data = held(noise(2, *size)._repr_html_())
    height, width = decoded(data)[0][0].shape[:2]
    assert (height, width) == tuple(side + side % 2 for side in shown)


def test_without_an_encoder_it_is_a_gif(monkeypatch):
    def none(path, codec):
        raise VideoError("no encoder")

    monkeypatch.setattr(larp.data.video, "_check_encoder", none)
    html = noise(5, 16, 16)._repr_html_()
    media, data = held(html)
    assert media == "image/gif" and "<img" in html
    assert Image.open(io.BytesIO(data)).n_frames == 5


def test_long_videos_are_cut_with_a_note_and_heavy_ones_become_a_sheet(monkeypatch):
    monkeypatch.setattr(notebook, "_MOST_FRAMES", 4)
    html = noise(9, 16, 16)._repr_html_()
    assert len(decoded(held(html)[1])[0]) == 4 and "the first 4 are shown, .save writes all" in html
    monkeypatch.setattr(notebook, "_MOST_BYTES", 1000)
    media, data = held(noise(9, 16, 16)._repr_html_())
    assert media == "image/png" and Image.open(io.BytesIO(data)).width > 4 * 160


def test_a_prompt_cannot_write_html():
    html = noise(2, 16, 16, prompt="<script>alert('x')</script>")._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html


def test_what_cannot_be_shown_says_so_and_raises_nothing(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(notebook, "write_video", full)
    html = noise(2, 16, 16, prompt="<b>")._repr_html_()
    assert html.startswith("<pre>&lt;Video of") and "No space left on device" in html and "<b>" not in html


@pytest.mark.parametrize(
    "frames, fps, words",
    [
        (np.zeros((0, 16, 16, 3), np.uint8), 8.0, "at least one frame"),
        (np.zeros((2, 16, 16, 3)), 8.0, r"float64 \(2, 16, 16, 3\)"),
        (np.zeros((16, 16, 3), np.uint8), 8.0, r"uint8 \(16, 16, 3\)"),
        ([[[[0, 0, 0]]]], 8.0, "got list"),
        (np.zeros((2, 16, 16, 3), np.uint8), float("nan"), "fps is nan"),
        (np.zeros((2, 16, 16, 3), np.uint8), 0, "fps is 0"),
    ],
)
def test_what_is_no_video_is_refused_when_it_is_made(frames, fps, words):
    with pytest.raises(ValueError, match=words):
        Video(frames, fps)
