"""What is written is shown as it was: its colours, its number of frames, and its frames and sound at their times."""

import struct
from fractions import Fraction

from larp.data.audio import AudioTrack
from larp.data.video import VideoWriter, iter_frames, probe, read_video, write_video
from tests.larp.data.field_videos import numbered
from tests.larp.data.odd_videos import RATE, write_unevenly, write_with_sound

import av
import numpy as np
import pytest
from PIL import Image

FRAMES = np.random.default_rng(0).integers(0, 255, (30, 16, 16, 3), dtype=np.uint8)
FLASHES, CLICKS = (5, 15, 24), 0.05


def copied(source, out) -> list[str]:
    """Write the video again with its sound, as it is read; return the notes."""
    info = probe(source)
    with AudioTrack(source) as audio, VideoWriter(out, info.fps, audio=audio, seconds=info.times.seconds) as writer:
        for frame in iter_frames(source):
            writer.write(frame[None])
    return audio.notes


def sound_times(path) -> list[float]:
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(container.streams.audio) if packet.size]
        return [float(packet.pts * packet.time_base) for packet in packets]


def flashes_and_clicks(path) -> tuple[list[float], list[float]]:
    """The times in seconds at which frames are white, and at which the sound sets in."""
    with av.open(str(path)) as container:
        flashes = [frame.time for frame in container.decode(video=0) if frame.to_ndarray(format="gray").mean() > 128]
    clicks = [-1.0]
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            for place in np.flatnonzero(np.abs(frame.to_ndarray().reshape(-1)) > 10_000):
                if (time := frame.time + place / RATE) > clicks[-1] + 2 * CLICKS:
                    clicks.append(time)
    return flashes, clicks[1:]


def write_flashes(path, seconds) -> None:
    """Write frames at these times and PCM sound; at each of FLASHES a white frame and a click."""
    sound = np.zeros(int((seconds[-1] + 0.2) * RATE), np.int16)
    for flash in FLASHES:
        sound[round(seconds[flash] * RATE) :][: int(CLICKS * RATE)] = 20_000
    with av.open(str(path), "w") as container:
        video, audio = container.add_stream("libx264", rate=10), container.add_stream("pcm_s16le", rate=RATE)
        video.width = video.height = 32
        video.pix_fmt, video.codec_context.time_base, audio.layout = "yuv420p", Fraction(1, 1000), "mono"
        for start in range(0, len(sound), 800):
            frame = av.AudioFrame.from_ndarray(sound[None, start : start + 800], format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, start, Fraction(1, RATE)
            container.mux(audio.encode(frame))
        for k, second in enumerate(seconds):
            pixels = np.full((32, 32, 3), 255 if k in FLASHES else 20, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(second * 1000), Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        container.mux(audio.encode())


@pytest.mark.parametrize("suffix", [".mkv", ".mov"])
def test_frames_at_uneven_times_stay_in_step_with_the_sound(tmp_path, suffix):
    write_flashes(tmp_path / "a.mkv", [k / 10 for k in range(10)] + [1 + k / 4 for k in range(20)])
    assert not probe(tmp_path / "a.mkv").even
    assert copied(tmp_path / "a.mkv", tmp_path / f"b{suffix}") == []
    flashes, clicks = flashes_and_clicks(tmp_path / f"b{suffix}")
    assert len(flashes) == 3 and clicks == pytest.approx(flashes, abs=0.01)
    assert np.diff(flashes) == pytest.approx([1.75, 2.25], abs=0.01)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "flv", "ts"])
def test_frames_at_one_time_are_a_tick_apart(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    with VideoWriter(path, 25, seconds=[0, 0.04, 0.04, 0.0401, *(0.2 + k for k in range(16))]) as writer:
        writer.write(numbered(20))
    assert probe(path).frames == 20


def test_a_container_of_one_rate_leaves_the_sound_of_uneven_frames_out(tmp_path):
    write_flashes(tmp_path / "a.mkv", [k / 10 for k in range(10)] + [1 + k / 4 for k in range(20)])
    (note,) = copied(tmp_path / "a.mkv", tmp_path / "b.avi")
    assert note == "the sound was left out: a .avi cannot show frames at uneven times, .mkv can"
    assert probe(tmp_path / "b.avi").frames == 30


def test_a_gif_has_uneven_times(tmp_path):
    before = probe(write_unevenly(tmp_path / "a.mp4", FRAMES))
    copied(tmp_path / "a.mp4", tmp_path / "b.gif")
    assert probe(tmp_path / "b.gif").times.seconds == pytest.approx(before.times.seconds, abs=0.02)


def moved_sound(source, out, move) -> None:
    """Copy an FLV file; `move` gets the number and time in ms of each packet of sound and returns its new time."""
    data, at, number = bytearray(source.read_bytes()), 13, 0
    while at < len(data):
        kind, size = data[at], int.from_bytes(data[at + 1 : at + 4], "big")
        if kind == 8 and data[at + 12]:
            data[at + 4 : at + 7] = move(number, int.from_bytes(data[at + 4 : at + 7], "big")).to_bytes(3, "big")
            number += 1
        at += 11 + size + 4
    out.write_bytes(data)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".flv"])
def test_a_repeated_time_of_sound_is_mended(tmp_path, suffix):
    good, bad = write_with_sound(tmp_path / "good.flv", FRAMES, 10), tmp_path / "bad.flv"
    moved_sound(good, bad, lambda k, ms: ms - 64 if k == 9 else ms)
    assert len(set(sound_times(bad))) == len(sound_times(good)) - 1
    for source in (good, bad):
        assert copied(source, tmp_path / f"{source.stem}{suffix}") == []
    assert sound_times(tmp_path / f"bad{suffix}") == pytest.approx(sound_times(tmp_path / f"good{suffix}"), abs=2e-3)


@pytest.mark.parametrize("suffix", [".mp4", ".ts"])
def test_sound_whose_times_go_back_is_left_out_where_they_do(tmp_path, suffix):
    good, bad = write_with_sound(tmp_path / "good.flv", FRAMES, 10), tmp_path / "bad.flv"
    moved_sound(good, bad, lambda k, ms: ms - 1000 if k >= 30 else ms)
    (note,) = copied(bad, tmp_path / f"b{suffix}")
    assert note == "the sound has gaps: 14 of its packets were left out, because their times go back"
    times = sound_times(tmp_path / f"b{suffix}")
    assert len(times) == len(sound_times(bad)) - 14 and min(np.diff(times)) > 0


def test_one_packet_of_sound_that_runs_ahead_costs_nothing(tmp_path):
    good, bad = write_with_sound(tmp_path / "good.flv", FRAMES, 10), tmp_path / "bad.flv"
    moved_sound(good, bad, lambda k, ms: ms + 3_600_000 if k == 9 else ms)
    assert copied(bad, tmp_path / "b.mp4") == []
    assert len(sound_times(tmp_path / "b.mp4")) == len(sound_times(good)) and max(sound_times(tmp_path / "b.mp4")) < 4


def test_an_avi_does_not_close_a_pause_of_the_sound(tmp_path):
    moved_sound(write_with_sound(tmp_path / "a.flv", FRAMES, 10), tmp_path / "b.flv", lambda k, ms: ms + 500 * (k > 20))
    (note,) = copied(tmp_path / "b.flv", tmp_path / "c.avi")
    assert note == "the sound ends early: an .avi cannot hold a pause of it, .mkv can"
    assert len(sound_times(tmp_path / "c.avi")) == 21


@pytest.mark.parametrize("suffix", [".flv", ".ts"])
def test_sound_that_ffmpeg_miswrites_is_left_out(tmp_path, suffix):
    """FFmpeg 8 ends the process over PCM in an FLV, and writes it into a transport stream as bytes that no player plays."""
    (note,) = copied(write_with_sound(tmp_path / "a.mkv", FRAMES, 10, codec="pcm_s16le"), tmp_path / f"b{suffix}")
    assert note == f"the sound was left out: {suffix} cannot hold pcm_s16le, .mkv can"


@pytest.mark.parametrize("height, tag", [(64, 6), (576, 6), (578, 1)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_colours_are_those_of_the_size_and_tagged(tmp_path, height, tag, suffix):
    colour = np.full((2, height, 32, 3), (200, 30, 60), np.uint8)
    write_video(tmp_path / f"a{suffix}", colour, 10)
    with av.open(str(tmp_path / f"a{suffix}")) as container:
        frame = next(container.decode(video=0))
        tags = frame.colorspace, container.streams.video[0].codec_context.color_primaries
        assert tags == (tag, tag) and frame.color_range == 1
        luma = {6: (0.299, 0.587, 0.114), 1: (0.2126, 0.7152, 0.0722)}[tag]
        assert frame.to_ndarray()[0, 0] == pytest.approx(16 + 219 / 255 * np.dot(luma, (200, 30, 60)), abs=2)
    assert np.abs(read_video(tmp_path / f"a{suffix}")[0].astype(int) - colour).max() <= 4


def test_a_gif_keeps_frames_in_which_nothing_moves(tmp_path):
    moving = np.zeros((6, 16, 24, 3), np.uint8)
    for k in range(6):
        moving[k, 4:8, 3 * k : 3 * k + 4] = 200
    for name, frames in (("still", moving[:1].repeat(24, 0)), ("partly", moving[[0, 1, 1, 1, 2, 3, 3, 4, 5, 5]])):
        write_video(tmp_path / f"{name}.gif", frames, 10)
        found, fps = read_video(tmp_path / f"{name}.gif")
        assert fps == 10 and np.array_equal(found, frames)
        with Image.open(tmp_path / f"{name}.gif") as picture:
            assert picture.n_frames == len(frames) and picture.info["duration"] == 100
            picture.seek(len(frames) - 1)
            assert np.array_equal(np.asarray(picture.convert("RGB")), frames[-1])


def test_a_gif_without_equal_frames_is_the_file_that_pillow_writes(tmp_path):
    write_video(tmp_path / "a.gif", FRAMES[:5], 10)
    first, *others = map(Image.fromarray, FRAMES[:5])
    first.save(tmp_path / "b.gif", save_all=True, append_images=others, duration=100, loop=0, disposal=1)
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


@pytest.mark.parametrize("form", ["MPO", "appended"])
def test_a_jpeg_with_a_second_picture_is_one_frame(tmp_path, form):
    """Phones append the gain map of an ultra-HDR picture, which is smaller; stereo cameras append the other view."""
    pictures = [Image.fromarray(np.full((size, 2 * size, 3), 90, np.uint8)) for size in (32, 16)]
    path = tmp_path / "a.jpg"
    if form == "MPO":
        pictures[0].save(path, "MPO", save_all=True, append_images=pictures[1:])
    else:
        for picture in pictures:
            picture.save(tmp_path / "one.jpg")
            with path.open("ab") as file:
                file.write((tmp_path / "one.jpg").read_bytes() + struct.pack("I", 0))
    assert probe(path).frames == 1 and read_video(path)[0].shape == (1, 32, 64, 3) and len(list(iter_frames(path))) == 1


def test_jpegs_in_a_row_are_a_video_by_their_suffix(tmp_path):
    Image.fromarray(FRAMES[0]).save(tmp_path / "a.jpg")
    (tmp_path / "a.mjpeg").write_bytes((tmp_path / "a.jpg").read_bytes() * 5)
    assert probe(tmp_path / "a.mjpeg").frames == len(read_video(tmp_path / "a.mjpeg")[0]) == 5
