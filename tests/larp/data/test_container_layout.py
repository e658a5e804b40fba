"""Files that stop before their end, which FFmpeg reads as shorter ones without a word."""

from pathlib import Path

from larp.data.container_layout import lacks_end
from larp.data.video import ShortVideoError, VideoError, count_frames, iter_frames, read_clip, read_video
from tests.larp.data.field_videos import cut, numbered, write

import av
import pytest
from PIL import Image

N = 12


def write_whole(path: Path) -> Path:
    """Write 12 frames, or one picture if the name begins with "still"."""
    pictures = [Image.fromarray(frame) for frame in numbered(N)]
    if path.suffix in (".gif", ".png", ".jpg"):
        more = {"save_all": True, "append_images": pictures[1:], "duration": 40} if path.stem != "still" else {}
        pictures[0].save(path, **more)
    elif path.suffix == ".mjpeg":
        for picture in pictures:
            picture.save(path.with_suffix(".jpg"))
            with open(path, "ab") as file:
                file.write(path.with_suffix(".jpg").read_bytes())
    else:
        write_vp8(path)
    return path


def write_vp8(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx", rate=24)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for frame in numbered(N):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.ogv", "a.mjpeg", "still.gif", "still.jpg"])
def test_a_file_without_its_end_is_refused_where_it_tells(tmp_path, name):
    whole = write_whole(tmp_path / name)
    held = count_frames(whole)
    assert held == len(read_video(whole)[0]) == (1 if name.startswith("still") else N)
    for share in (0.6, 0.999):
        path = cut(whole, tmp_path / f"cut-{name}", share)
        for read in (read_video, lambda path: list(iter_frames(path))):
            with pytest.raises(
                VideoError, match=rf"cut-{name}: (truncated: the file stops before its|cannot be decoded)"
            ):
                read(path)
    if path.suffix in (".gif", ".png") and held > 1:  # what is whole is still read
        assert len(read_clip(path, 0, 5)) == 5


@pytest.mark.parametrize("name", ["a.gif", "a.png", "still.jpg"])
def test_data_after_the_end_is_not_looked_at(tmp_path, name):
    path = write_whole(tmp_path / name)
    path.write_bytes(path.read_bytes() + b"more of a phone")
    assert len(read_video(path)[0]) == count_frames(path)


def test_matroska_without_a_length_is_refused_if_its_size_is_not_reached(tmp_path):
    path = write(tmp_path / "a.mkv", numbered(48))
    data = bytearray(cut(path, tmp_path / "half.mkv", 0.6).read_bytes())
    place = data.find(b"\x44\x89\x88")  # Duration, of eight bytes: now a void
    data[place : place + 11] = b"\xec\x89" + bytes(9)
    (tmp_path / "half.mkv").write_bytes(data)
    with pytest.raises(ShortVideoError, match=r"half.mkv: truncated: the file stops"):
        read_video(tmp_path / "half.mkv")


@pytest.mark.parametrize("kind", ["gif", "apng", "jpeg_pipe", "mjpeg", "ogg", "matroska,webm"])
@pytest.mark.parametrize("data", [b"", b"G", b"GIF89a", b"\xff\xd8\xff", b"OggS", b"\x1a\x45\xdf\xa3", bytes(5000)])
def test_any_bytes_have_an_answer(tmp_path, kind, data):
    (tmp_path / "a").write_bytes(data)
    assert lacks_end(tmp_path / "a", kind) in (True, False)
