"""A folder of sampled videos."""

from larp.data.contact_sheet import Gallery
from larp.data.video import probe

import numpy as np
import pytest
from PIL import Image

RED = (200, 20, 20)


def video(frames: int = 12) -> np.ndarray:
    return np.full((frames, 16, 24, 3), RED, dtype=np.uint8)


def test_videos_are_numbered_and_shown_on_one_sheet(tmp_path):
    gallery = Gallery(tmp_path / "new" / "out", 10)
    paths = [gallery.add(name, video()) for name in ("Surfing", "a / b: ../c", "")]
    assert [path.name for path in paths] == ["000-Surfing.mp4", "001-a-b-..-c.mp4", "002-.mp4"]
    assert gallery.write_sheet() == tmp_path / "new" / "out" / "sheet.png"
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == [
        *("000-Surfing.mp4", "001-a-b-..-c.mp4", "002-.mp4", "sheet.png")
    ]
    info = probe(paths[0])
    assert (info.frames, info.fps, info.height, info.width) == (12, 10, 256, 384)
    sheet = np.asarray(Image.open(tmp_path / "new" / "out" / "sheet.png"))
    assert (sheet == RED).all(axis=-1).sum() == 3 * 8 * 80 * 120


def test_pixels_are_repeated_scale_times(tmp_path):
    info = probe(Gallery(tmp_path, 10, scale=3).add("a", video()))
    assert (info.height, info.width) == (48, 72)
    with pytest.raises(ValueError, match=r"scale must be at least 1, got 0"):
        Gallery(tmp_path, 10, scale=0)


def test_the_same_name_is_replaced_and_the_rest_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for count in (3, 5):
        gallery = Gallery(tmp_path, 10)
        gallery.add("a", video(count))
        gallery.write_sheet()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000-a.mp4", "mine.txt", "sheet.png"]
    assert probe(tmp_path / "000-a.mp4").frames == 5


def test_an_empty_sheet_is_refused(tmp_path):
    with pytest.raises(ValueError, match="0 videos"):
        Gallery(tmp_path, 10).write_sheet()
