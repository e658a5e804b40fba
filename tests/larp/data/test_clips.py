"""Frames to clips and back, clip starts, and contact sheets."""

import math

from larp.data.clips import ClipShape, choose_start, clip_to_frames, frames_to_clip, resize_frames, scale_frames
from larp.data.contact_sheet import contact_sheet, side_by_side

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image


def noise(frames=3, height=24, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def test_round_trip_at_the_same_size_is_exact():
    video = noise(height=32)
    clip = frames_to_clip(video, 32, 32)
    assert clip.shape == (3, 3, 32, 32) and clip.dtype == torch.float32 and clip.min() >= 0 and clip.max() <= 1
    assert np.array_equal(clip_to_frames(clip), video)


def test_values_outside_the_range_are_clamped():
    clip = torch.tensor([-1.0, 0.5, 2.0]).view(3, 1, 1, 1)
    assert clip_to_frames(clip).tolist() == [[[[0, 128, 255]]]]
    with pytest.raises(ValueError, match=r"\(3, T, H, W\)"):
        clip_to_frames(torch.zeros(1, 3, 4, 8, 8))


def test_resize_is_antialiased_bilinear_of_the_short_side_then_centre_crop():
    video = noise(frames=40, height=60, width=100)
    small = F.interpolate(
        torch.from_numpy(video).permute(0, 3, 1, 2).double(),
        size=(30, 50),
        mode="bilinear",
        antialias=True,
        align_corners=False,
    )
    expected = small[..., 10:40].permute(0, 2, 3, 1).numpy()
    assert np.abs(resize_frames(video, 30, 30) - expected).max() <= 0.51


@pytest.mark.parametrize("size", [(1, 1), (7, 200), (200, 7), (31, 33)])
def test_any_size_is_resized_to_the_requested_size(size):
    assert resize_frames(noise(2, *size), 16, 24).shape == (2, 16, 24, 3)


def resized_then_cropped(video: np.ndarray, frame: tuple[int, int]) -> np.ndarray:
    """The definition of `resize_frames`: resize the whole frame, then crop the centre."""
    scale = max(new / old for new, old in zip(frame, video.shape[1:3], strict=True))
    new = [max(side, round(old * scale)) for side, old in zip(frame, video.shape[1:3], strict=True)]
    top, left = ((whole - side) // 2 for whole, side in zip(new, frame, strict=True))
    return scale_frames(video, *new)[:, top : top + frame[0], left : left + frame[1]]


# Codes of stored videos rest on every bit.
@pytest.mark.parametrize("size", [(240, 320), (64, 64), (360, 640), (65, 64), (640, 360), (64, 256), (256, 64)])
def test_ordinary_frames_equal_the_plain_resize(size):
    video = noise(2, *size)
    assert np.array_equal(resize_frames(video, 64, 64), resized_then_cropped(video, (64, 64)))


@pytest.mark.parametrize("size", [(2, 31), (31, 2), (1, 400), (90, 1001), (1300, 120), (40, 500)])
@pytest.mark.parametrize("frame", [(16, 16), (16, 24), (15, 8)])
def test_elongated_frames_are_close_to_the_plain_resize(size, frame):
    video = noise(2, *size)
    apart = np.abs(resize_frames(video, *frame) - resized_then_cropped(video, frame).astype(int))
    assert apart.max() <= 1 and (apart > 0).mean() < 0.02  # where one of two sums is rounded up, the other down


@pytest.mark.parametrize("size", [(1, 16000), (16000, 1), (3, 12000)])
def test_the_work_is_bounded_for_any_aspect_ratio(monkeypatch, size):
    made = []
    real = F.interpolate

    def watched(pixels, **options):
        made.append(max(pixels.numel(), pixels.shape[0] * 3 * math.prod(options["size"])))
        return real(pixels, **options)

    monkeypatch.setattr(F, "interpolate", watched)
    assert resize_frames(np.zeros((4, *size, 3), np.uint8), 64, 64).shape == (4, 64, 64, 3)
    assert max(made) <= 4 * 3 * 64 * 64 * 4


@pytest.mark.parametrize("count, given, framed", [(7, 5, 5), (40, 32, 4), (40, 3, 3), (40, 0, 0), (5, 5, 5)])
def test_given_frames_get_a_border_and_leave_room_for_the_others(tmp_path, count, given, framed):
    contact_sheet([np.full((count, 16, 16, 3), 40, np.uint8)], [""], tmp_path / "a.png", cell=16, given=given)
    row = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))[24, :, :].astype(int)  # through the pictures
    blue, dark = row[:, 2] - row[:, 0] > 100, (row == 40).all(1)
    edges = np.flatnonzero(np.diff(dark.astype(int)) == 1) + 1  # where a picture begins
    assert len(edges) == min(count, 8) and [blue[x - 1] for x in edges[:framed]] == [True] * framed
    assert [bool(blue[x + 16]) for x in edges] == [True] * framed + [False] * (len(edges) - framed)


def test_starts_are_centred_or_cover_the_whole_range():
    shape = ClipShape(frames=4, height=8, width=8, stride=2)
    assert shape.span == 7 and choose_start(11, shape) == 2
    assert {choose_start(11, shape, u) for u in np.linspace(0, 0.999, 50)} == {0, 1, 2, 3, 4}
    assert choose_start(7, shape, 0.9999999) == 0
    with pytest.raises(ValueError, match=r"has 6 frames, the clip needs 7 at stride 2"):
        choose_start(6, shape)
    with pytest.raises(ValueError, match=r"ClipShape.stride=0"):
        ClipShape(4, 8, 8, 0)


def test_side_by_side_puts_originals_left():
    white, black = np.full((2, 4, 4, 3), 255, np.uint8), np.zeros((2, 4, 4, 3), np.uint8)
    joined = side_by_side([white] * 3, [black] * 3, pairs_per_row=2)
    assert joined.shape == (2, 8, 16, 3)
    assert joined[0, 0, :, 0].tolist() == [255] * 4 + [0] * 4 + [255] * 4 + [0] * 4
    assert joined[0, 7, 8:].max() == 0
    with pytest.raises(ValueError, match=r"1 originals and 2"):
        side_by_side([white], [black, black])
    with pytest.raises(ValueError, match=r"one shape"):
        side_by_side([white], [black[:1]])


def test_contact_sheet_shows_every_video_enlarged(tmp_path):
    red = np.zeros((16, 32, 32, 3), np.uint8)
    red[..., 0] = 255
    path = tmp_path / "new" / "sheet.png"
    contact_sheet(
        [red, red[:1], noise(5, 200, 300)], ["a red frame", "short", "a very large one"], path, columns=4, cell=80
    )
    sheet = np.asarray(Image.open(path))
    assert sheet.shape[0] > 64 + 64 + 80
    assert (sheet == [255, 0, 0]).all(axis=-1).sum() == 64 * 64 * 5
    assert [entry.name for entry in path.parent.iterdir()] == ["sheet.png"]
    with pytest.raises(ValueError, match=r"1 videos and 2 captions"):
        contact_sheet([red], ["a", "b"], path)
