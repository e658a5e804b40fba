"""Audio is copied from one file to another unchanged, or a note states why not."""

from fractions import Fraction
from itertools import pairwise

from larp.data.audio import AudioTrack
from larp.data.open_video import VideoError
from larp.data.video import VideoWriter, count_frames, probe, write_video
from tests.larp.data.odd_videos import sound_of, sound_start, write_with_sound

import av
import numpy as np
import pytest

FRAMES = np.random.default_rng(0).integers(0, 255, (30, 16, 16, 3), dtype=np.uint8)


def carried(source, out) -> list[str]:
    """Write other frames with the audio of `source`; return the notes."""
    with AudioTrack(source) as audio, VideoWriter(out, 10, audio=audio) as writer:
        for start in range(0, 30, 7):
            writer.write(FRAMES[start : start + 7])
    return audio.notes


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".avi", ".ts", ".flv", ".m4v", ".3gp"])
def test_audio_is_copied_exactly(tmp_path, suffix):
    source = write_with_sound(tmp_path / "a.mp4", FRAMES, 10)
    assert carried(source, tmp_path / f"b{suffix}") == []
    before, after = sound_of(source), sound_of(tmp_path / f"b{suffix}")
    assert len(before) > 40_000 and np.abs(before).mean() > 0.1
    assert abs(len(before) - len(after)) <= 2048  # a container without an edit list plays the encoder's run-in too
    assert any(np.array_equal(before[:40_000], after[k : k + 40_000]) for k in (0, 1024, 2048))
    assert probe(tmp_path / f"b{suffix}").frames == 30


def test_audio_is_timed_from_the_first_frame(tmp_path):
    source = write_with_sound(tmp_path / "a.mkv", FRAMES, 10, codec="pcm_s16le", delay=1.0)
    carried(source, tmp_path / "b.mkv")
    with AudioTrack(tmp_path / "b.mkv") as audio:
        video_late = audio._shift * audio.stream.time_base
    assert float(video_late) - sound_start(tmp_path / "b.mkv") == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("suffix, words", [(".gif", "a .gif holds none"), (".mpg", ".mpg cannot hold aac, .mkv can")])
def test_containers_without_audio_are_written_without_it(tmp_path, suffix, words):
    (note,) = carried(write_with_sound(tmp_path / "a.mp4", FRAMES, 10), tmp_path / f"b{suffix}")
    assert note.startswith("the sound was left out") and words in note
    assert sound_of(tmp_path / f"b{suffix}").size == 0 and probe(tmp_path / f"b{suffix}").frames == 30


def test_a_video_without_audio_gives_no_note(tmp_path):
    write_video(tmp_path / "a.mp4", FRAMES, 10)
    assert carried(tmp_path / "a.mp4", tmp_path / "b.mp4") == []


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.mp4").write_text("hello")
    with pytest.raises(VideoError, match=r"a.mp4: does not begin like a video"), AudioTrack(tmp_path / "a.mp4"):
        pass


def test_a_failed_write_is_not_reported_as_an_audio_error(tmp_path):
    source = write_with_sound(tmp_path / "a.mp4", FRAMES, 10)
    with pytest.raises(OSError, match=r"disk"), AudioTrack(source):
        raise OSError("disk")


def test_audio_that_does_not_decode_is_copied(tmp_path, clips_root):
    for name in ("video_with_failing_audio.mp4", "test.avi"):
        assert carried(clips_root / "odd" / name, tmp_path / "b.mp4") == []
        with AudioTrack(tmp_path / "b.mp4") as audio:
            assert audio.codec.startswith("mp3") and sum(1 for _ in audio.packets(None)) > 200


@pytest.mark.parametrize("delay", [0, 0.25, 1])
def test_frames_and_sound_of_an_avi_are_in_step_within_a_frame(tmp_path, delay):
    """Sound before the first frame, such as what AAC begins with, moves the frames; FFmpeg shows H.264 in an AVI a frame late."""
    frames = np.zeros((24, 32, 32, 3), np.uint8)
    path = write_with_sound(tmp_path / "a.mp4", frames, 24, delay=delay)
    with AudioTrack(path) as audio, VideoWriter(tmp_path / "a.avi", 24, audio=audio) as writer:
        writer.write(frames)
    with AudioTrack(path) as audio:
        lead = -next(audio.packets(None)).dts * audio.stream.time_base
    with av.open(str(tmp_path / "a.avi")) as container:
        frame = next(container.decode(video=0))
        assert lead > 0 and 0 <= frame.pts * frame.time_base - lead <= Fraction(1, 24)
    assert sound_start(tmp_path / "a.avi") == 0 and count_frames(tmp_path / "a.avi") == 24


def test_a_first_packet_that_a_fragment_stretches_has_its_own_length(tmp_path):
    """With B-frames, whose decoding begins before the sound."""
    frames, path = np.zeros((24, 32, 32, 3), np.uint8), tmp_path / "a.mp4"
    whole, flags = str(write_with_sound(tmp_path / "whole.mp4", frames, 24)), "frag_keyframe+empty_moov+dash"
    with av.open(whole) as source, av.open(str(path), "w", options={"movflags": flags}) as target:
        streams = [target.add_stream_from_template(stream) for stream in source.streams]
        for packet in source.demux():
            if packet.size:
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    with av.open(str(path)) as container:
        assert next(container.demux(audio=0)).duration > 1024
    with AudioTrack(path) as audio:
        packets = list(audio.packets(None))
    assert {later.dts - sooner.dts for sooner, later in pairwise(packets)} == {1024} and packets[0].duration == 1024
