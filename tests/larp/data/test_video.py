"""Video files: unusual ones decode or are refused quickly, malicious ones are refused, written ones read back."""

import os
import signal
import time
from fractions import Fraction
from pathlib import Path

from larp.data.video import (
    ShortVideoError,
    VideoError,
    VideoWriter,
    count_frames,
    iter_frames,
    probe,
    read_video,
    write_video,
)
from tests.larp.data.odd_videos import write_unevenly

import av
import numpy as np
import pytest
from PIL import Image


def moving_square(frames=12, height=32, width=48):
    video = np.full((frames, height, width, 3), 40, np.uint8)
    for t in range(frames):
        video[t, 8:20, t : t + 12] = (220, 60, 50)
    return video


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, moving_square(), fps=10)
    return path


def test_round_trip_keeps_frames_fps_and_pixels(clip):
    video, fps = read_video(clip)
    assert video.shape == (12, 32, 48, 3) and video.dtype == np.uint8 and fps == 10
    assert np.abs(video.astype(int) - moving_square()).mean() < 4
    info = probe(clip)
    assert (info.width, info.height, info.frames, info.codec) == (
        48,
        32,
        12,
        "h264",
    ) and info.duration_s == pytest.approx(1.2)


def test_a_part_of_a_video_equals_the_same_frames_of_the_whole(clip):
    whole, _ = read_video(clip)
    part, _ = read_video(clip, start=3, count=3, stride=4)
    assert np.array_equal(part, whole[3:12:4])
    assert np.array_equal(np.stack(list(iter_frames(clip))), whole)


def test_reading_past_the_end_reports_the_number_of_frames(clip):
    with pytest.raises(ShortVideoError, match=r"clip.mp4.*asked for 16 frames from frame 2.*holds 12") as caught:
        read_video(clip, start=2, count=16)
    assert caught.value.frames == 12
    with pytest.raises(ShortVideoError, match=r"holds 12 frames, none at or after frame 12"):
        read_video(clip, start=12)
    with pytest.raises(VideoError, match=r"stride=0"):
        read_video(clip, stride=0)


@pytest.mark.parametrize("name", ["-dash.mp4", "a:b.mp4", "späß 1.mp4"])
def test_awkward_names(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_video(name, moving_square(), 10)
    assert len(read_video(name)[0]) == 12


def test_odd_sizes_are_padded_to_even_and_kept_in_444(tmp_path):
    video = moving_square(height=33, width=47)
    write_video(tmp_path / "a.mp4", video, 10)
    assert read_video(tmp_path / "a.mp4")[0].shape[1:3] == (34, 48)
    write_video(tmp_path / "b.mp4", video, 10, pixel_format="yuv444p", quality=4)
    exact = read_video(tmp_path / "b.mp4")[0]
    assert exact.shape == video.shape and np.abs(exact.astype(int) - video).mean() < 1


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_quality_and_codec_change_the_file(tmp_path, codec):
    noise = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "good.mp4", noise, 10, codec=codec, quality=8)
    write_video(tmp_path / "poor.mp4", noise, 10, codec=codec, quality=45)
    assert (tmp_path / "poor.mp4").stat().st_size * 2 < (tmp_path / "good.mp4").stat().st_size
    assert probe(tmp_path / "good.mp4").codec == {"libx264": "h264"}.get(codec, codec)


def test_gif(tmp_path):
    write_video(tmp_path / "a.gif", moving_square(), 10)
    video, fps = read_video(tmp_path / "a.gif")
    assert video.shape == (12, 32, 48, 3) and fps == pytest.approx(10, rel=0.02)
    assert np.abs(video.astype(int) - moving_square()).mean() < 3


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_written_in_pieces_it_is_the_same_file(tmp_path, name):
    whole, pieces = tmp_path / name, tmp_path / f"pieces-{name}"
    write_video(whole, moving_square(), 10)
    with VideoWriter(pieces, 10) as writer:
        for start, stop in ((0, 1), (1, 8), (8, 12)):
            writer.write(moving_square()[start:stop])
        assert not pieces.exists()
    assert pieces.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, clip, error):
    before = clip.read_bytes()
    with pytest.raises(error), VideoWriter(clip, 10) as writer:
        writer.write(moving_square())
        raise error
    assert clip.read_bytes() == before and os.listdir(tmp_path) == ["clip.mp4"]


def test_pieces_must_have_one_size_and_there_must_be_one(tmp_path):
    with pytest.raises(VideoError, match=r"a.mp4.*need one size"), VideoWriter(tmp_path / "a.mp4", 10) as writer:
        writer.write(moving_square())
        writer.write(moving_square(height=16))
    with pytest.raises(VideoError, match=r"a.mp4: no frame was written"), VideoWriter(tmp_path / "a.mp4", 10):
        pass
    assert os.listdir(tmp_path) == []


def test_a_gif_beyond_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("larp.data.video_encoders.MAX_BYTES", 10_000)
    with pytest.raises(VideoError, match=r"choose an .mp4"):
        write_video(tmp_path / "a.gif", moving_square(), 10)
    assert os.listdir(tmp_path) == []


def test_missing_encoder_names_the_remedy_and_leaves_nothing(tmp_path):
    with pytest.raises(VideoError, match=r"out.mp4: this FFmpeg has no encoder 'libx999'.*mpeg4.*\.gif"):
        write_video(tmp_path / "out.mp4", moving_square(), 10, codec="libx999")
    assert os.listdir(tmp_path) == []


def test_bad_frames_and_fps_are_refused(tmp_path):
    with pytest.raises(VideoError, match=r"uint8"):
        write_video(tmp_path / "a.mp4", moving_square().astype(float), 10)
    with pytest.raises(VideoError, match=r"uint8"):
        write_video(tmp_path / "a.mp4", moving_square()[:0], 10)
    with pytest.raises(VideoError, match=r"fps"):
        write_video(tmp_path / "a.mp4", moving_square(), 0)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fps", [0.01, 1000, np.float32(25), Fraction(30000, 1001)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_every_accepted_rate_can_be_written(tmp_path, suffix, fps):
    write_video(tmp_path / f"a{suffix}", moving_square(2), fps)
    assert probe(tmp_path / f"a{suffix}").fps == pytest.approx(float(fps))


@pytest.mark.parametrize("fps", [1e-9, 1e4, float("nan"), "25", None])
def test_other_rates_are_refused(tmp_path, fps):
    with pytest.raises(VideoError, match=r"fps is .*; it must be a number from 0.01 to 1000"):
        write_video(tmp_path / "a.mp4", moving_square(2), fps)


def test_the_slowest_gif_is_written(tmp_path):
    write_video(tmp_path / "a.gif", moving_square(2), 0.01)
    assert Image.open(tmp_path / "a.gif").info["duration"] == 100_000


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_a_full_disk_is_named_and_not_the_encoder(tmp_path, full_disk, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (8, 96, 96, 3), dtype=np.uint8)
    with full_disk(), pytest.raises(VideoError, match=rf"a{suffix}: cannot be written: File too large$"):
        write_video(tmp_path / f"a{suffix}", noise, 10)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_created_is_named(tmp_path, clip):
    with pytest.raises(VideoError, match=r"clip.mp4/a.mp4: cannot be written: (Not a directory|File exists)"):
        write_video(clip / "a.mp4", moving_square(), 10)


@pytest.mark.parametrize("kind", [str, Path])
def test_urls_are_not_written_to(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VideoError, match=r"^http://x/y.mp4: URLs are not written to"):
        write_video(kind("http://x/y.mp4"), moving_square(), 10)
    assert os.listdir(tmp_path) == []


def test_a_failed_write_keeps_the_old_file(tmp_path, clip):
    before = clip.read_bytes()
    with pytest.raises(VideoError, match=r"cannot be written"):
        write_video(clip, moving_square(), 10, pixel_format="no-such-format")
    assert clip.read_bytes() == before and os.listdir(tmp_path) == ["clip.mp4"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"#EXTM3U\n#EXTINF:1\n/etc/passwd\n", "playlist"),
        (b"ffconcat version 1.0\nfile '/etc/passwd'\n", "playlist"),
        (b"<?xml version='1.0'?><MPD/>", "playlist"),
        (b"hello, I am no video", "does not begin like a video"),
        (b"\x00\x00\x00\x20ftypisom" + bytes(100), "cannot be decoded|no video stream"),
    ],
)
def test_other_files_are_refused(tmp_path, content, reason):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    for read in (read_video, probe, count_frames):
        with pytest.raises(VideoError, match=rf"a.mp4: .*({reason})"):
            read(path)


def test_missing_files_and_folders_are_video_errors(tmp_path):
    with pytest.raises(VideoError, match=r"none.mp4: no such file"):
        read_video(tmp_path / "none.mp4")
    with pytest.raises(VideoError, match=rf"{tmp_path.name}: is a folder: give the name of a video file"):
        read_video(tmp_path)


@pytest.fixture
def impatient():
    """Fails a test that blocks on opening a pipe."""

    def tired(*_):
        raise TimeoutError("waited")

    before = signal.signal(signal.SIGALRM, tired)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("read", [read_video, probe, count_frames, lambda path: list(iter_frames(path))])
def test_pipes_and_devices_are_refused_at_once(tmp_path, impatient, read):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "link.mp4").symlink_to("pipe.mp4")
    (tmp_path / "null.mp4").symlink_to(os.devnull)
    (tmp_path / "folder.mp4").symlink_to(".")
    for name, found in {
        "pipe": r"a pipe \(fifo\), no file: write the video to a file",
        "link": "a pipe",
        "null": "a device",
        "folder": "a folder",
    }.items():
        with pytest.raises(VideoError, match=rf"{name}.mp4: is {found}"):
            read(tmp_path / f"{name}.mp4")


def test_a_link_to_a_file_is_read(tmp_path, clip):
    (tmp_path / "link.mp4").symlink_to(clip)
    assert probe(tmp_path / "link.mp4").frames == 12


@pytest.mark.parametrize("kind", [str, Path])
def test_paths_without_a_file_have_different_messages(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VideoError, match=r"^no video was named"):
        probe(kind(""))
    for url in ("http://example.com/a.mp4", "s3://bucket/a.mp4"):
        with pytest.raises(VideoError, match=rf"^{url}: URLs are not opened: download the video"):
            probe(kind(url))
    (tmp_path / "take:").mkdir()
    write_video("take:/a.mp4", np.zeros((2, 16, 16, 3), np.uint8), 10)
    assert probe(kind("take:/a.mp4")).frames == 2


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_picture_is_a_video_of_one_frame(tmp_path, suffix):
    picture = Image.fromarray(moving_square()[0, :31])
    turned = picture.getexif()
    turned[0x0112] = 6
    picture.save(tmp_path / f"a{suffix}", quality=95, **({"exif": turned} if suffix == ".jpg" else {}))
    frames, _ = read_video(tmp_path / f"a{suffix}")
    want = np.rot90(moving_square()[0, :31], -1) if suffix == ".jpg" else moving_square()[0, :31]
    assert frames.shape == (1, *want.shape) and np.abs(frames[0].astype(int) - want).mean() < 3
    info = probe(tmp_path / f"a{suffix}")
    assert (info.height, info.width, info.frames) == (*want.shape[:2], 1)


def test_a_varying_frame_rate_is_noticed(tmp_path, clip):
    assert probe(clip).even and not probe(write_unevenly(tmp_path / "a.mp4", moving_square())).even


def test_frames_over_max_pixels_are_refused_before_decoding(clip):
    with pytest.raises(VideoError, match=r"48x32 pixels per frame is over max_pixels=100"):
        read_video(clip, max_pixels=100)


def test_truncation_is_never_silent(tmp_path):
    """A file truncated anywhere gives all requested frames or an error."""
    write_video(tmp_path / "whole.avi", moving_square(40), 10, codec="mpeg4")
    data = (tmp_path / "whole.avi").read_bytes()
    for cut in (0.3, 0.6, 0.8):
        (tmp_path / "cut.avi").write_bytes(data[: int(len(data) * cut)])
        with pytest.raises(VideoError, match=r"cut.avi"):
            read_video(tmp_path / "cut.avi", start=0, count=40)


def test_frames_that_the_decoder_leaves_out_are_not_missed_in_silence(tmp_path):
    """A piece of the file with a key frame is lost, so that what follows cannot be decoded; FFmpeg gives no error."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=20, options={"g": "20"})
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        frames = [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in noise]
        packets = [packet for frame in (*frames, None) for packet in stream.encode(frame)]
        container.mux(packets[:10] + packets[23:])
    for read in (read_video, lambda path: list(iter_frames(path))):
        with pytest.raises(ShortVideoError, match=r"a.mkv: damaged: of 27 stored frames 2\d decode"):
            read(tmp_path / "a.mkv")


def test_mutated_files_raise_only_video_errors(tmp_path, clip):
    data, rng = bytearray(clip.read_bytes()), np.random.default_rng(0)
    for _ in range(60):
        bad = data.copy()
        for place in rng.integers(0, len(bad), 8):
            bad[place] = int(rng.integers(256))
        (tmp_path / "bad.mp4").write_bytes(bad)
        try:
            assert len(read_video(tmp_path / "bad.mp4", count=12)[0]) == 12
        except VideoError as error:
            assert "bad.mp4" in str(error)


def test_odd_real_files_decode_or_are_refused_quickly(clips_root):
    frames = {}
    for path in sorted((clips_root / "odd").iterdir()):
        began = time.process_time()
        try:
            frames[path.name] = read_video(path, count=min(16, count_frames(path)))[0].shape
        except VideoError as error:
            frames[path.name] = str(error)
        assert time.process_time() - began < 5, path.name
    assert frames["video_90.mov"] == (3, 568, 320, 3) and frames["video_0.mov"] == (3, 320, 568, 3)
    assert frames["-video-with-dash-.mp4"] == (5, 1, 1, 3)
    for name in (
        "av1_video.mkv",
        "h264_10bits.mp4",
        "bt709_full_range.mp4",
        "circle.gif",
        "test.avi",
        "video_with_failing_audio.mp4",
    ):
        assert frames[name][0] == 16, name
    with pytest.raises(VideoError, match=r"corrupted.mp4"):
        read_video(clips_root / "odd" / "corrupted.mp4")


def test_rotation_agrees_with_the_picture_as_stored(clips_root):
    path = clips_root / "odd" / "video_90.mov"
    with av.open(str(path)) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.array_equal(read_video(path, count=1)[0][0], np.rot90(stored, -1))
    assert (probe(path).width, probe(path).height) == (320, 568)


def test_original_ucf101_files_decode_whole(clips_root):
    path = sorted((clips_root / "ucf101_original").rglob("*.avi"))[0]
    video, fps = read_video(path)
    assert video.shape[1:] == (240, 320, 3) and 24 < fps < 31 and abs(len(video) - probe(path).frames) <= 2
