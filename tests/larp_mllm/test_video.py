"""Video: checks, files of each suffix, and the display in notebooks."""

import base64
import io
import re
from fractions import Fraction

import larp.data.video
from larp.data.video import VideoError, probe
from larp_mllm import video as module
from larp_mllm.video import SUFFIXES, Video

import av
import numpy as np
import pytest
from PIL import Image


def noise(count: int, height: int, width: int, fps: float = 8.0, prompt: str = "") -> Video:
    frames = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return Video(frames, fps, prompt)


def embedded(html: str) -> tuple[str, bytes]:
    """The media type and bytes of the one file in the HTML."""
    (found,) = re.findall(r'src="data:([a-z0-9/]+);base64,([A-Za-z0-9+/=]+)"', html)
    return found[0], base64.b64decode(found[1], validate=True)


def decoded(data: bytes) -> tuple[list[np.ndarray], float]:
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return frames, float(container.streams.video[0].average_rate)


def test_a_notebook_displays_an_enlarged_video():
    video = noise(7, 16, 24, fps=6.0)
    html = video._repr_html_()
    media, data = embedded(html)
    frames, rate = decoded(data)
    assert media == "video/mp4" and "<video" in html and "controls" in html and "loop" in html
    assert len(frames) == 7 and rate == 6.0 and frames[0].shape == (256, 384, 3)
    assert 'width="384" height="256"' in html
    # Each pixel is now a square of its colour.
    small = np.stack(frames)[:, 8::16, 8::16].astype(int)
    assert np.abs(small - video.frames).mean() < 40


@pytest.mark.parametrize("size, displayed", [((100, 1000), (52, 512)), ((301, 201), (301, 201)), ((5, 3), (260, 156))])
def test_large_videos_are_scaled_down_and_none_is_stretched(size, displayed):
    _, data = embedded(noise(2, *size)._repr_html_())
    height, width = decoded(data)[0][0].shape[:2]
    assert (height, width) == tuple(side + side % 2 for side in displayed)


def test_without_an_encoder_a_gif_is_displayed(monkeypatch):
    def no_encoder(path, codec):
        raise VideoError("no encoder")

    monkeypatch.setattr(larp.data.video, "check_encoder", no_encoder)
    html = noise(5, 16, 16)._repr_html_()
    media, data = embedded(html)
    assert media == "image/gif" and "<img" in html
    assert Image.open(io.BytesIO(data)).n_frames == 5


def test_long_videos_are_cut_with_a_note_and_heavy_ones_become_a_contact_sheet(monkeypatch):
    monkeypatch.setattr(module, "_MAX_FRAMES", 4)
    html = noise(9, 16, 16)._repr_html_()
    assert len(decoded(embedded(html)[1])[0]) == 4 and "the first 4 are shown, .save writes all" in html
    monkeypatch.setattr(module, "_MAX_BYTES", 1000)
    media, data = embedded(noise(9, 16, 16)._repr_html_())
    assert media == "image/png" and Image.open(io.BytesIO(data)).width > 4 * 160


def test_a_prompt_is_escaped():
    html = noise(2, 16, 16, prompt="<script>alert('x')</script>")._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html


def test_an_error_of_the_display_is_displayed_not_raised(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_video", full)
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
        (np.zeros((2, 16, 16, 3), np.uint8), 1e-9, "fps is 1e-09; it must be a number from 0.01 to 1000"),
        (np.zeros((2, 16, 16, 3), np.uint8), float("inf"), "fps is inf"),
        (np.zeros((2, 16, 16, 3), np.uint8), "25", "fps is '25'"),
        (np.zeros((2, 16, 16, 3), np.uint8), None, "fps is None"),
    ],
)
def test_bad_frames_and_rates_are_refused(frames, fps, words):
    with pytest.raises(ValueError, match=words):
        Video(frames, fps)


@pytest.mark.parametrize("given", [-1, 3, 0.5, True])
def test_a_bad_number_of_given_frames_is_refused(given):
    with pytest.raises(ValueError, match=f"given is {given}; of 2 frames"):
        Video(np.zeros((2, 16, 16, 3), np.uint8), 8.0, given=given)


@pytest.mark.parametrize("codes", [("1", "2"), "12", (1.0, 2.0), (True, 1), 3, None])
def test_codes_that_are_no_whole_numbers_are_refused(codes):
    with pytest.raises(ValueError, match=r"codes must be whole numbers, got .*: leave them out"):
        Video(np.zeros((2, 16, 16, 3), np.uint8), 8.0, codes=codes)
    assert Video(np.zeros((2, 16, 16, 3), np.uint8), 8.0, codes=np.arange(3)).codes == (0, 1, 2)


@pytest.mark.parametrize("fps", [np.float32(25), np.int64(25), Fraction(25), 25])
def test_a_rate_of_any_kind_of_number_can_be_saved(tmp_path, fps):
    video = Video(np.zeros((2, 16, 16, 3), np.uint8), fps)
    assert type(video.fps) is float and probe(video.save(tmp_path / "a.mp4")).fps == 25


@pytest.mark.parametrize("path, scale, words", [
    (None, 1, "give its name, got None"),
    (3, 1, "give its name, got 3"),
    ("a.mp4", 10**6, r"a.mp4: pictures of 24000000x16000000 pixels \(scale 1000000\).* 16384: choose a smaller scale"),
    ("a.png", 1024, "16384"),
    ("http://x/y.mp4", 1, "^http://x/y.mp4: URLs are not written to"),
    ("http://x/y.png", 1, "^http://x/y.png: URLs are not written to"),
    ("a\0.png", 1, "zero byte"),
])  # fmt: skip
def test_bad_arguments_of_save_leave_no_file(tmp_path, monkeypatch, path, scale, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        noise(2, 16, 24).save(path, scale)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".png", ".gif", ".mp4"])
def test_an_error_of_a_full_disk_names_the_file_and_leaves_none(tmp_path, full_disk, suffix):
    with full_disk(), pytest.raises(VideoError, match=rf"a{suffix}: cannot be written: File too large$"):
        noise(8, 96, 96).save(tmp_path / f"a{suffix}")
    assert not list(tmp_path.iterdir())


def test_a_contact_sheet_is_enlarged_by_scale(tmp_path):
    small, large = (Image.open(noise(2, 64, 64).save(tmp_path / f"{scale}.png", scale)) for scale in (1, 3))
    assert small.height < 64 + 40 and large.height > 3 * 64 and large.width > 2 * 3 * 64


def test_a_contact_sheet_frames_the_given_frames_in_blue(tmp_path):
    def blue(video):
        pixels = np.asarray(Image.open(video.save(tmp_path / "a.png")).convert("RGB")).astype(int)
        return ((pixels == (0x2F, 0x6F, 0xDF)).all(-1)).sum()

    dark = np.zeros((6, 64, 64, 3), np.uint8)
    assert blue(Video(dark, 8.0)) == 0 < blue(Video(dark, 8.0, given=2)) < blue(Video(dark, 8.0, given=4))


def test_a_contact_sheet_of_very_wide_pictures_is_bounded(tmp_path):
    assert Image.open(noise(2, 2, 6000).save(tmp_path / "a.png")).width < 2 * 4096 + 20


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_videos_are_saved_by_suffix(qwen, tmp_path, suffix):
    path = qwen.generate(["surfing"])[0].save(tmp_path / f"clip{suffix}", scale=2)
    assert path.stat().st_size > 100
    if suffix not in (".png", ".gif"):  # a GIF merges equal frames, which random weights give
        info = probe(path)
        assert (info.width, info.height, info.frames) == (32, 32, 4)
    if suffix == ".mp4":
        assert info.fps == 8.0


@pytest.mark.parametrize("suffix", [".webm", ".jpg", ".xyz", ""])
def test_other_suffixes_are_refused(qwen, tmp_path, suffix):
    with pytest.raises(ValueError, match=r"choose one of \.mp4"):
        qwen.generate(["surfing"])[0].save(tmp_path / f"clip{suffix}")
    assert not list(tmp_path.iterdir())


def test_a_video_is_a_sequence_of_frames():
    video = noise(7, 4, 6, prompt="a red circle")
    assert len(video) == 7 and [frame.shape for frame in video] == [(4, 6, 3)] * 7
    assert np.array_equal(video[3], video.frames[3]) and np.array_equal(video[np.int64(-1)], video.frames[6])
    assert np.array_equal(np.stack(list(video)), video.numpy())
    with pytest.raises(IndexError):
        video[7]
    with pytest.raises(TypeError):
        video["a"]


def test_a_slice_is_a_video_with_its_share_of_what_was_given():
    frames = noise(8, 4, 6).frames
    video = Video(frames, 12.0, "a red circle", codes=(3, 1), given=5)
    part = video[2:7]
    assert isinstance(part, Video) and np.array_equal(part.frames, frames[2:7])
    assert (part.fps, part.prompt, part.codes, part.given) == (12.0, "a red circle", (), 3)
    assert (video[::3].fps, video[::3].given) == (4.0, 2) and np.array_equal(video[::3].frames, frames[::3])
    assert (video[::-1].fps, video[::-1].given) == (12.0, 0) and np.array_equal(video[::-1].frames, frames[::-1])
    assert video[:].codes == (3, 1) and video[5:].given == 0
    with pytest.raises(ValueError, match="at least one frame"):
        video[3:3]


def test_a_video_is_an_array_and_a_tensor(tmp_path):
    video = noise(3, 4, 6)
    assert np.asarray(video) is video.frames and np.asarray(video, dtype=np.float32).dtype == np.float32
    copied = np.array(video)
    assert np.array_equal(copied, video.frames) and copied is not video.frames
    for given in (video, video[::-1]):
        tensor = given.torch()
        assert tensor.shape == (3, 4, 6, 3) and np.array_equal(tensor.numpy(), given.frames)
    assert video[::-1].save(tmp_path / "backwards.gif").exists()


def test_videos_are_equal_if_their_codes_are():
    frames = noise(3, 4, 6).frames
    video = Video(frames, 8.0, "a", codes=(1, 2))
    assert video == Video(frames // 2, 5.0, "b", codes=np.array([1, 2])) != Video(frames, 8.0, "a", codes=(1, 3))
    assert hash(video) == hash(Video(frames // 2, 5.0, codes=(1, 2))) and video != "a"
    without = Video(frames, 8.0)
    assert without == Video(frames.copy(), 8.0) and without != video and without != Video(frames // 2, 8.0)
    assert len({without, Video(frames.copy(), 8.0), video}) == 2
