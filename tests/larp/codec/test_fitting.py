"""Resizing frames of any size to a tokenizer's frame size and back."""

from larp.codec.fitting import FITS, Fitting
from larp.data.clips import resize_frames

import numpy as np
import pytest

SIZES = [(240, 320), (320, 240), (64, 64), (31, 47), (1, 1), (2, 900), (900, 2)]


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("source", SIZES, ids=str)
def test_any_size_is_fitted_and_undone(fit, source):
    fitting = Fitting(fit, source, (16, 24))
    frames = np.random.default_rng(0).integers(0, 255, (2, *source, 3), dtype=np.uint8)
    fitted = fitting.apply(frames)
    assert fitted.shape == (2, 16, 24, 3) and fitted.dtype == np.uint8
    assert fitting.undo(fitted).shape == (2, *fitting.visible_size, 3)
    assert all(new <= old for new, old in zip(fitting.visible_size, source, strict=True))


def test_crop_equals_training():
    frames = np.random.default_rng(0).integers(0, 255, (2, 240, 320, 3), dtype=np.uint8)
    fitting = Fitting("crop", (240, 320), (64, 64))
    assert np.array_equal(fitting.apply(frames), resize_frames(frames, 64, 64))
    assert fitting.visible_size == (240, 240)


def test_stretch_and_pad_show_the_whole_picture():
    left_red = np.zeros((1, 40, 160, 3), np.uint8)
    left_red[:, :, :40, 0] = 254
    stretched = Fitting("stretch", (40, 160), (64, 64)).apply(left_red)
    assert stretched[0, :, :14, 0].min() > 249 and stretched[0, :, 18:, 0].max() < 5
    fitting = Fitting("pad", (40, 160), (64, 64))
    padded = fitting.apply(left_red + 1)
    assert fitting.picture == (24, 0, 16, 64) and fitting.visible_size == (40, 160)
    assert padded[0, :24].max() == padded[0, 40:].max() == 0 and padded[0, 24:40].min() > 0
    assert np.abs(fitting.undo(padded).astype(int) - (left_red + 1)).mean() < 4


@pytest.mark.parametrize("fit, same", [("crop", False), ("stretch", True), ("pad", True)])
def test_undo_restores_the_source_size_unless_cropped(fit, same):
    assert (Fitting(fit, (568, 320), (64, 64)).visible_size == (568, 320)) == same


def test_a_picture_of_one_row_is_cropped():
    row = np.zeros((1, 1, 9000, 3), np.uint8)
    row[:, :, 4500:] = 255
    shown = Fitting("crop", (1, 9000), (128, 128)).apply(row)
    assert shown.shape == (1, 128, 128, 3) and shown[0, 60, 0].max() < 70 and shown[0, 60, -1].min() > 185


def test_invalid_fits_and_sizes():
    with pytest.raises(ValueError, match=r"crop, stretch, pad, not 'zoom'"):
        Fitting("zoom", (4, 4), (16, 16))
    with pytest.raises(ValueError, match=r"source: 0x4 pixels"):
        Fitting("pad", (4, 0), (16, 16))
