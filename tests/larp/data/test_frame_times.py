"""Which frames of a video file are shown, when, and at which rate, whatever its header states."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

from larp.data.audio import AudioTrack
from larp.data.clips import ClipShape
from larp.data.extraction import read_windows
from larp.data.frame_times import FrameTimes, whole_packets
from larp.data.listing import VideoItem, VideoSet
from larp.data.loader import ClipLoader
from larp.data.video import ShortVideoError, VideoError, count_frames, iter_frames, probe, read_video, write_video
from tests.larp.data.field_videos import copy, cut, numbered, numbers, state_frames, write

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

N = 48


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with 48 frames at 24 a second, with B-frames, as plain.mp4, plain.mkv, plain.flv, plain.ts and plain.avi."""
    folder = tmp_path_factory.mktemp("plain")
    write(folder / "plain.mp4", numbered(N))
    for suffix in ("mkv", "flv", "ts"):
        copy(folder / "plain.mp4", folder / f"plain.{suffix}")
    write(folder / "plain.avi", numbered(N))
    return folder


def assert_shown(path: Path, shown: list[int], fps: float = 24, of: int = N) -> None:
    """Check that all ways of reading a file show these frames, numbered as in `numbered(of)`, within 2 ms of their length."""
    assert count_frames(path) == len(shown)
    info = probe(path)
    assert info.frames == len(shown) and info.even
    assert info.duration_s == len(shown) / info.fps == pytest.approx(len(shown) / fps, abs=0.002)
    frames, rate = read_video(path)
    assert rate == info.fps and numbers(frames, of) == shown
    assert np.array_equal(np.stack(list(iter_frames(path))), frames)
    if len(shown) > 6:
        assert np.array_equal(read_video(path, 3, 2, 3)[0], frames[3:7:3])


@pytest.mark.parametrize("hidden", [1, 10, 30, 47])
@pytest.mark.parametrize("options", [{}, {"movflags": "faststart"}])
def test_frames_that_an_edit_list_hides_are_not_counted(tmp_path, made, hidden, options):
    path = copy(made / "plain.mp4", tmp_path / "trimmed.mp4", lambda k: -hidden / 24, **options)
    assert_shown(path, list(range(hidden, N)))


def test_in_memory_and_from_the_file_a_trimmed_video_gives_the_same_clips(tmp_path, made):
    path = copy(made / "plain.mp4", tmp_path / "trimmed.mp4", lambda k: -20 / 24)
    videos, shape = VideoSet((VideoItem(path, "a"),), (), "test:"), ClipShape(8, 32, 32)
    batches = [next(iter(ClipLoader(videos, shape, 4, 4, 0, in_memory=kept)))["clip"] for kept in (False, True)]
    assert batches[0].equal(batches[1])
    first = [numbers((clip.permute(1, 2, 3, 0) * 255).numpy(), N)[0] for clip in batches[0]]
    assert all(20 <= number <= 40 for number in first)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("seconds", [2.5, 36_000, 2**33 / 90_000 - 1])
def test_a_late_start_and_a_clock_that_wraps_change_nothing(tmp_path, made, suffix, seconds):
    options = {"mpegts_copyts": "1"} if suffix == "ts" else {}
    path = copy(made / "plain.mp4", tmp_path / f"late.{suffix}", lambda k: seconds, **options)
    assert_shown(path, list(range(N)))


def test_a_clock_that_jumps_within_a_broadcast_does_not_slow_the_video(tmp_path, made):
    jump = {"mpegts_copyts": "1", "max_delay": "0"}
    path = copy(made / "plain.mp4", tmp_path / "jump.ts", lambda k: 3600 * (k >= 20), **jump)
    assert_shown(path, list(range(N)))


def test_a_recording_that_begins_between_key_frames_is_counted_from_the_first_one(tmp_path, made):
    path = copy(made / "plain.mp4", tmp_path / "joined.ts", first=5)
    held = len(list(iter_frames(path)))
    assert 20 < held < N - 5 and count_frames(path) == held == probe(path).frames


@pytest.mark.parametrize("stated", [0, 1, 480])
def test_an_avi_may_state_any_number_of_frames(tmp_path, made, stated):
    path = state_frames(made / "plain.avi", tmp_path / "a.avi", stated)
    assert_shown(path, list(range(N)))


@pytest.mark.parametrize("flags", ["frag_keyframe", "frag_keyframe+empty_moov"])
def test_fragments_count_beside_the_header(tmp_path, made, flags):
    path = copy(made / "plain.mp4", tmp_path / "a.mp4", movflags=flags)
    assert_shown(path, list(range(N)))
    held = count_frames(cut(path, tmp_path / "broken_off.mp4", 0.8))
    assert 20 < held < N and len(read_video(tmp_path / "broken_off.mp4")[0]) == held


def test_an_edit_list_hides_frames_in_fragments_too(tmp_path, made):
    flags = {"movflags": "frag_keyframe+empty_moov+delay_moov"}
    assert_shown(copy(made / "plain.mp4", tmp_path / "a.mp4", lambda k: -17 / 24, **flags), list(range(17, N)))


@pytest.mark.parametrize("damaged", [1, 0.4])
def test_an_index_that_leads_astray_is_not_followed(tmp_path, made, damaged):
    data = bytearray((made / "plain.avi").read_bytes())
    place = data.rfind(b"idx1") + 8
    for entry in range(place, place + int((len(data) - place) * damaged) - 12, 16):
        data[entry + 8 : entry + 12] = bytes([entry % 251, entry % 7, 0, 9])
    (tmp_path / "a.avi").write_bytes(data)
    assert_shown(tmp_path / "a.avi", list(range(N)))


@pytest.mark.parametrize("suffix", ["avi", "flv"])
def test_a_recording_that_broke_off_has_the_frames_that_are_whole(tmp_path, made, suffix):
    path = cut(made / f"plain.{suffix}", tmp_path / f"half.{suffix}", 0.78)
    if suffix == "avi":
        path = state_frames(path, tmp_path / "a.avi", 0)
    else:  # recorders write the length at the end
        data = bytearray(path.read_bytes())
        place = data.find(b"duration") + 9
        data[place : place + 8] = bytes(8)
        path.write_bytes(data)
    frames = read_video(path)[0]
    assert 10 < len(frames) == count_frames(path) < N - 5
    assert numbers(frames, N) == list(range(len(frames)))


@pytest.mark.parametrize("name", ["plain.mkv", "plain.flv", "plain.avi", "fast.mp4", "trimmed.mp4"])
def test_a_file_that_is_cut_in_half_is_refused_by_name(tmp_path, made, name):
    whole = made / name
    if name.endswith("mp4"):
        hidden = {"fast.mp4": 0, "trimmed.mp4": 5}[name]
        whole = copy(made / "plain.mp4", tmp_path / name, lambda k: -hidden / 24, movflags="faststart")
    path = cut(whole, tmp_path / f"half-{name}", 0.6)
    for read in (read_video, lambda path: list(iter_frames(path))):
        with pytest.raises(ShortVideoError, match=rf"half-{name}: truncated: the header promises \d+ frames"):
            read(path)


@pytest.mark.parametrize("suffix", ["mkv", "flv"])
@pytest.mark.parametrize("stated", [1000, 60, 25])
@pytest.mark.parametrize("rate", [30, 24, 15, Fraction(30_000, 1001)])
def test_the_rate_is_that_of_the_frame_times(tmp_path, suffix, stated, rate):
    path = write(tmp_path / f"a.{suffix}", numbered(N), stated, seconds=lambda k: k / rate)
    assert_shown(path, list(range(N)), float(rate))


@pytest.mark.parametrize("rate", [Fraction(24_000, 1001), Fraction(30_000, 1001), 12, 50, 60])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_a_rate_that_is_stated_rightly_is_kept_to_the_last_bit(tmp_path, suffix, rate):
    path = write(tmp_path / f"a.{suffix}", numbered(20), rate, codec="mpeg4" if suffix == "avi" else "libx264")
    assert probe(path).fps == float(rate) and probe(path).even


@pytest.mark.parametrize("flags", ["frag_keyframe", "frag_keyframe+empty_moov+default_base_moof"])
@pytest.mark.parametrize("rate", [24, Fraction(30_000, 1001), 60])
def test_sound_that_begins_first_does_not_slow_a_fragmented_video(tmp_path, flags, rate):
    """Its first frame is shown from the beginning of the sound on, for 21 ms more."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": flags}) as container:
        video = container.add_stream("libx264", rate=rate, options={"bf": "0"})
        video.height, video.width, video.pix_fmt = 32, 32, "yuv420p"
        sound = container.add_stream("aac", rate=48_000, layout="mono")
        for start in range(0, int(N / rate * 48_000), 1024):
            piece = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            piece.sample_rate, piece.pts, piece.time_base = 48_000, start, Fraction(1, 48_000)
            container.mux(sound.encode(piece))
        for pixels in numbered(N):
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode())
        container.mux(sound.encode())
    info = probe(path)
    assert info.even and info.fps == float(rate) and info.times.early == pytest.approx(1024 / 48_000, abs=0.001)
    with AudioTrack(path) as track:
        assert float(next(track.packets(None)).pts * track.stream.time_base) == pytest.approx(
            -info.times.early, abs=1e-4
        )


@pytest.mark.parametrize("suffix", ["flv", "mkv", "mp4"])
@pytest.mark.parametrize("stated", [30, 1000])
@pytest.mark.parametrize(
    ("rate", "count"),
    [
        (Fraction(30_000, 1001), 20),
        (Fraction(24_000, 1001), 20),
        (Fraction(60_000, 1001), 40),
        (25, 4),
        (30, 8),
        (50, 9),
        (Fraction(15_000, 1001), 40),
    ],
)
def test_times_in_milliseconds_are_those_of_the_nearest_usual_rate(tmp_path, suffix, rate, count, stated):
    options = {"video_track_timescale": "1000"} if suffix == "mp4" else {}
    path = write(tmp_path / f"a.{suffix}", numbered(count), stated, seconds=lambda k: k / rate, **options)
    assert probe(path).fps == float(rate) and type(probe(path).fps) is float


@pytest.mark.parametrize("rate", [24, 25, Fraction(30_000, 1001)])
def test_times_that_were_once_in_milliseconds_are_those_of_a_usual_rate(tmp_path, rate):
    """As in an MP4 that was copied from an FLV."""
    path = write(tmp_path / "a.mp4", numbered(N), 30, seconds=lambda k: k / rate, video_track_timescale="15360")
    assert probe(path).fps == float(rate) and probe(path).even


def test_films_in_a_broadcast_have_the_rate_of_films(tmp_path):
    """Their frames are two and three fields long in turn."""
    path = write(tmp_path / "a.mkv", numbered(N), 1000, seconds=lambda k: (k * 5 // 2) * 1001 / 60_000)
    assert probe(path).fps == 24_000 / 1001 and probe(path).even


@pytest.mark.parametrize("suffix", ["avi", "mp4"])
def test_one_dropped_frame_is_not_rounded_away(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    codec = "ffv1" if suffix == "avi" else "libx264"
    write(path, numbered(N), 24, seconds=lambda k: (k + (k > 24)) / 24, codec=codec)
    assert probe(path).duration_s == pytest.approx((N + 1) / 24, abs=0.001)


@pytest.mark.parametrize("suffix", ["flv", "mkv", "mp4", "avi", "gif"])
@pytest.mark.parametrize("rate", [14.985, 17.3, 12.5, 29.5, 23.5, 31.25])
def test_a_rate_that_is_not_usual_is_not_bent(tmp_path, suffix, rate):
    rate, count = Fraction(rate).limit_denominator(1001), 40
    if suffix == "avi":
        path = write(tmp_path / "a.avi", numbered(count), rate, codec="mpeg4")
        assert probe(path).fps == float(rate) == probe(write(path, numbered(3), rate, codec="mpeg4")).fps
    elif suffix == "gif":
        write_video(path := tmp_path / "a.gif", numbered(count), float(rate))
        assert probe(path).fps == 100 / round(100 / rate)
    else:
        path = write(tmp_path / f"a.{suffix}", numbered(count), 1000, seconds=lambda k: k / rate)
        assert probe(path).fps == pytest.approx(float(rate), rel=1e-3 if count * 1000 / rate < 2000 else 6e-4)


def test_frames_that_a_recorder_dropped_are_no_damage(tmp_path):
    path = write(tmp_path / "a.avi", numbered(30), 25, seconds=lambda k: (k if k < 10 else k + 20) / 25)
    info = probe(path)
    assert info.frames == len(read_video(path)[0]) == 30 and not info.even
    assert info.fps == pytest.approx(15, rel=0.03)


def slowing(k: int) -> float:
    """Thirty frames in the first second, then one each half second."""
    return k / 30 if k < 30 else 1 + (k - 30) / 2


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "flv", "ts"])
def test_times_of_a_varying_rate(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", numbered(60), 30, seconds=slowing)
    info = probe(path)
    assert not info.even and info.fps == pytest.approx(60 / 15.5, rel=0.02) and info.frames == 60
    assert info.times.seconds == pytest.approx([slowing(k) for k in range(60)], abs=0.0011)
    for second, frame in ((0, 0), (0.5, 15), (1, 30), (5, 38), (5.2, 38), (15.5, 59)):
        assert info.times.at(second) == frame
    assert info.times.at(20) >= 60
    (window,) = read_windows(VideoItem(path, "a"), ClipShape(16, 32, 32), 1)
    # Its middle lies in the middle of the time, not of the frames, and it plays at its own rate.
    assert abs(slowing(window.start + 8) - 7.75) <= 0.5 and window.fps == pytest.approx(2, rel=0.01)
    starts = [window.start for window in read_windows(VideoItem(path, "a"), ClipShape(16, 32, 32), 3)]
    assert all(later - sooner >= 16 for sooner, later in pairwise(starts)) and starts[2] <= 44
    videos, shape = VideoSet((VideoItem(path, "a"),), (), "test:"), ClipShape(16, 32, 32)
    for kept in (False, True):
        batch = next(iter(ClipLoader(videos, shape, 1, 1, 0, shuffle=False, in_memory=kept)))
        assert batch["clip"][0].equal(window.clip)


def test_frames_of_one_time_share_the_time_until_the_next(tmp_path, made):
    """MPEG program streams with sound repeat a time now and then."""
    with av.open(str(made / "plain.mp4")) as source, av.open(str(tmp_path / "a.ts"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts += round((packet.pts * packet.time_base == 1) / 24 / packet.time_base)
                packet.stream = stream
                target.mux(packet)
    times = probe(tmp_path / "a.ts").times
    assert np.diff(times.seconds)[22:27] * 24 == pytest.approx([1, 2, 0.5, 0.5, 1], abs=0.01) and times.count == N


def test_an_empty_packet_is_no_frame():
    """Theora repeats a frame with one."""
    empty, end, whole = (SimpleNamespace(size=size, is_corrupt=False) for size in (0, 0, 9))
    container = SimpleNamespace(demux=lambda stream: [whole, empty, whole, end], format=SimpleNamespace(name="ogg"))
    assert [*whole_packets(container, None)] == [whole, whole, end]


def test_even_times_are_numbers_of_frames():
    even = FrameTimes(100, 24.0)
    assert [even.at(s) for s in (0, 0.03, 1, 5)] == [0, 1, 24, 120]
    assert even.window(40, 16) == 40 and even.rate(3, 16) == 24 and even.first(7) == FrameTimes(7, 24.0)


def test_gaps_that_are_even_are_no_varying_rate(tmp_path):
    """MPEG-2 of 25 frames a second may count fields: its base rate is 50."""
    path = write(tmp_path / "a.mkv", numbered(20), 50, seconds=lambda k: k / 25)
    with av.open(str(path)) as container:
        assert container.streams.video[0].base_rate == 50
    assert probe(path).even and probe(path).fps == 25


def test_a_gif_has_the_times_of_its_delays(tmp_path):
    pictures = [Image.fromarray(frame) for frame in numbered(6)]
    for name, delays in (("even", [100] * 6), ("uneven", [100, 100, 1200, 100, 100, 100])):
        path = tmp_path / f"{name}.gif"
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=delays)
        info = probe(path)
        assert info.even == (name == "even") and info.duration_s == pytest.approx(sum(delays) / 1000)


def test_an_animated_png_is_a_video(tmp_path):
    pictures = [Image.fromarray(frame) for frame in numbered(6)]
    pictures[0].save(tmp_path / "a.png", save_all=True, append_images=pictures[1:], duration=100)
    assert_shown(tmp_path / "a.png", list(range(6)), 10, of=6)


def write_with_picture(path: Path, frames: np.ndarray | None, attached: bool) -> Path:
    """Write a small picture as the first stream, and a video of 32x32 frames or a sound as the second."""
    with av.open(str(path), "w") as container:
        picture = container.add_stream("mjpeg", rate=1)
        picture.width, picture.height, picture.pix_fmt = 16, 16, "yuvj420p"
        if attached:
            picture.disposition = Disposition.attached_pic
        if frames is None:
            other = container.add_stream("aac", rate=16_000)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 16_000
            pieces = [sound]
        else:
            other = container.add_stream("libx264", rate=24, options={"qmin": "1", "qmax": "4"})
            other.width, other.height, other.pix_fmt = 32, 32, "yuv420p"
            pieces = [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames]
        cover = av.VideoFrame.from_ndarray(numbered(1, 16, 16)[0], format="rgb24")
        for stream, parts in ((picture, [cover]), (other, pieces)):
            for part in parts:
                container.mux(stream.encode(part))
            container.mux(stream.encode())
    return path


def test_the_best_stream_is_the_video_and_not_a_picture(tmp_path):
    assert_shown(write_with_picture(tmp_path / "thumbnail.mkv", numbered(N), False), list(range(N)))
    assert_shown(write_with_picture(tmp_path / "cover.mp4", numbered(N), True), list(range(N)))
    path = write_with_picture(tmp_path / "song.mp4", None, True)
    for read in (probe, count_frames, read_video):
        with pytest.raises(VideoError, match=r"song.mp4: holds no video stream, only a picture beside the sound"):
            read(path)


@pytest.mark.parametrize("suffix", ["m2ts", "mts", "vob"])
def test_streams_of_camcorders_and_discs(tmp_path, made, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "vob":
        write(path, numbered(N), codec="mpeg2video")
        assert count_frames(path) == len(read_video(path)[0]) == N
        return
    copy(made / "plain.mp4", tmp_path / "a.m2ts", mpegts_m2ts_mode="1")
    path.write_bytes((tmp_path / "a.m2ts").read_bytes())
    assert path.read_bytes()[4] == path.read_bytes()[196] == 0x47
    assert_shown(path, list(range(N)))


def test_a_transport_stream_may_begin_inside_a_packet(tmp_path, made):
    data = (made / "plain.ts").read_bytes()
    (tmp_path / "a.ts").write_bytes(data[-100:] + data)
    assert_shown(tmp_path / "a.ts", list(range(N)))
