"""Frames are shown upright, mirrored where the file says so, and with square pixels."""

from fractions import Fraction
from pathlib import Path

from larp.data.video import VideoError, iter_frames, probe, read_video
from tests.larp.data.field_videos import numbered, write

import av
import numpy as np
import pytest
from PIL import Image, ImageOps


def picture(height: int = 32, width: int = 48) -> np.ndarray:
    """Return a picture that differs in every orientation, in flat areas that survive JPEG."""
    pixels = np.full((height, width, 3), 60, np.uint8)
    pixels[: height // 2, : width // 2] = 250
    pixels[: height // 2, width // 2 :] = (200, 40, 40)
    return pixels


def assert_read(path: Path, want: np.ndarray, most: float) -> None:
    info, (frames, _) = probe(path), read_video(path)
    assert (info.height, info.width) == want.shape[:2] == frames.shape[1:3]
    assert np.abs(frames[0].astype(int) - want).mean() <= most
    assert np.array_equal(next(iter_frames(path)), frames[0])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_all_orientations_of_cameras(tmp_path, suffix, orientation):
    image = Image.fromarray(picture())
    exif = image.getexif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    image.save(path, exif=exif, **({"quality": 98, "subsampling": 0} if suffix == ".jpg" else {}))
    with Image.open(path) as saved:
        want = np.asarray(ImageOps.exif_transpose(saved).convert("RGB"))
    assert_read(path, want, 1)


@pytest.mark.parametrize("angle", [0, 90, 180, 270])
@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True)])
def test_all_display_matrices_of_videos(tmp_path, angle, flips):
    path = write(tmp_path / "a.mp4", np.stack([picture()] * 3), rotation=(angle, *flips))
    with av.open(str(path)) as container:
        want = np.rot90(next(container.decode(video=0)).to_ndarray(format="rgb24"), angle // 90)
    assert_read(path, want[:: -1 if flips[1] else 1, :: -1 if flips[0] else 1], 0)


def test_side_data_that_pyav_does_not_know_hides_no_rotation(tmp_path):
    """Each picture of a camera's motion JPEG holds EXIF data, which PyAV 18 refuses to name."""
    image = Image.fromarray(picture())
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif, quality=98, subsampling=0)
    with av.open(str(tmp_path / "a.jpg")) as pictures, av.open(str(tmp_path / "a.avi"), "w") as container:
        target = container.add_stream_from_template(pictures.streams.video[0])
        (packet,) = [packet for packet in pictures.demux(video=0) if packet.size]
        packet.stream = target
        container.mux(packet)
    assert_read(tmp_path / "a.avi", np.rot90(picture(), -1), 1)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
@pytest.mark.parametrize("shape, width", [("2", 64), ("8/9", 28), ("1/2", 16), ("16/11", 47), ("1", 32)])
def test_pixels_become_square(tmp_path, suffix, shape, width):
    path = write(tmp_path / f"a{suffix}", numbered(3), pixel_shape=Fraction(shape))
    info, (frames, _) = probe(path), read_video(path)
    assert (info.width, info.height) == (width, 32) and frames.shape == (3, 32, width, 3)
    assert frames[0, 4, width // 2 - 3].mean() > 240 > 50 > frames[0, 4, width // 2 + 3].mean()


def test_the_shape_of_pixels_turns_with_the_frame(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(3), pixel_shape=Fraction(2), rotation=(90, False, False))
    assert (probe(path).width, probe(path).height) == (32, 64) and read_video(path)[0].shape == (3, 64, 32, 3)


def test_shapes_of_pixels_that_damage_makes_are_ignored_or_refused(tmp_path):
    path = write(tmp_path / "a.mkv", numbered(3), pixel_shape=Fraction(200))
    assert probe(path).width == 32
    path = write(tmp_path / "b.mkv", numbered(3), pixel_shape=Fraction(8))
    for read in (probe, read_video, lambda path, **limit: list(iter_frames(path, **limit))):
        with pytest.raises(VideoError, match=r"b.mkv: 256x32 pixels per shown frame are over max_pixels=2048"):
            read(path, max_pixels=2048)


def test_a_picture_has_square_pixels_whatever_its_resolution_on_paper(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png", dpi=(300, 150))
    assert_read(tmp_path / "a.png", picture(), 0)
