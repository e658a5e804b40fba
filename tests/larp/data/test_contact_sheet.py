"""A folder of sampled videos."""

from larp.data.caption_line import CaptionLine, _font_files, _font_for
from larp.data.contact_sheet import Gallery, contact_sheet
from larp.data.video import probe

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

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


def drawn(caption: str) -> np.ndarray:
    """The line of a caption as dark pixels, bool (H, W)."""
    line = CaptionLine(caption, 600)
    picture = Image.new("L", (640, 24), 255)
    line.draw(ImageDraw.Draw(picture), 0, 0)
    return np.asarray(picture) < 128


@pytest.mark.parametrize(
    "caption", ["\u4e2d\u6587", "\U0001f436 runs", "\u0939\u093f\u0928\u094d", "\udcff", "a\u202eb"]
)
def test_what_no_font_has_is_ascii_and_not_a_box(monkeypatch, caption):
    monkeypatch.setattr("larp.data.caption_line._font_files", lambda: ())
    _font_for.cache_clear()
    shown = "".join(text for _, text in CaptionLine(caption, 600)._runs)
    _font_for.cache_clear()
    assert shown.isascii() and all(character in shown for character in caption if character.isascii())
    assert ("\\u" in shown.lower()) == (caption != "a\u202eb")


def test_other_scripts_are_drawn_in_a_font_that_has_them():
    """Pillow's own font has no Cyrillic."""
    if not any("DejaVuSans" in path for path in _font_files()):
        pytest.skip("no font with Cyrillic, Greek and Arabic letters here")
    boxes = Image.new("L", (640, 24), 255)
    ImageDraw.Draw(boxes).text((0, 0), "\u043c\u0438\u0440", font=ImageFont.load_default(14))
    assert drawn("\u043c\u0438\u0440").sum() > 30 and not np.array_equal(
        drawn("\u043c\u0438\u0440"), np.asarray(boxes) < 128
    )
    for text in ("\u043c\u0438\u0440", "\u03ac\u03b3\u03ac\u03c0\u03b7", "\u0633\u0644\u0627\u0645"):
        assert "".join(part for _, part in CaptionLine(text, 600)._runs) == text
    assert np.array_equal(drawn("a\nb\tc"), drawn("a b c"))


def test_long_captions_are_cut_to_one_line(tmp_path):
    contact_sheet([video()] * 2, ["word " * 100_000, "short"], tmp_path / "a.png")
    width = Image.open(tmp_path / "a.png").width
    assert width <= 1024 and "".join(text for _, text in CaptionLine("word " * 100_000, 600)._runs).endswith("...")
    contact_sheet([video()], ["two\nlines"], tmp_path / "b.png")
    contact_sheet([video()], ["two lines"], tmp_path / "c.png")
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "c.png").read_bytes()
