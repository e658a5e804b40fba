""".npy files of frames are read like videos, listed in manifests, and refused in one line if damaged."""

import json
import os
from pathlib import Path

from larp.data.clips import ClipShape
from larp.data.datasets import open_videos
from larp.data.doctor import examine
from larp.data.loader import ClipLoader, iterate_once
from larp.data.video import ShortVideoError, VideoError, count_frames, iter_frames, probe, read_video

import numpy as np
import pytest


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 16, 20, 3), dtype=np.uint8)


@pytest.fixture
def clip(tmp_path, frames) -> Path:
    np.save(tmp_path / "clip.npy", frames)
    return tmp_path / "clip.npy"


def test_it_is_read_like_a_video(clip, frames):
    assert count_frames(clip) == 12
    found = probe(clip)
    assert (found.width, found.height, found.frames, found.fps) == (20, 16, 12, 25.0)
    whole, fps = read_video(clip)
    assert fps == 25.0 and np.array_equal(whole, frames)
    assert np.array_equal(read_video(clip, 1, 3, 4)[0], frames[1:10:4])
    assert np.array_equal(read_video(clip, 5, stride=3)[0], frames[5::3])
    assert np.array_equal(np.stack(list(iter_frames(clip))), frames)
    whole[:] = 0  # the caller's own
    assert np.array_equal(read_video(clip)[0], frames)


def test_reading_past_the_end_is_refused(clip):
    with pytest.raises(ShortVideoError, match=r"asked for 8 frames from frame 5, but the video holds 12") as caught:
        read_video(clip, 5, 8)
    assert caught.value.frames == 12
    with pytest.raises(ShortVideoError, match="none at or after frame 12"):
        read_video(clip, 12)
    with pytest.raises(VideoError, match="need start >= 0"):
        read_video(clip, -1)
    with pytest.raises(VideoError, match="over max_pixels=319"):
        read_video(clip, max_pixels=319)


def spoil(path: Path, kind: str, frames: np.ndarray) -> None:
    arrays = {
        "float": frames.astype(np.float32),
        "one picture": frames[0],
        "four channels": np.zeros((4, 8, 8, 4), np.uint8),
        "no frame": frames[:0],
        "objects": np.array([{}, []], dtype=object),
    }
    if kind in arrays:
        np.save(path, arrays[kind], allow_pickle=True)
    elif kind == "cut":
        np.save(path, frames)
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "an archive":
        with path.open("wb") as file:
            np.savez(file, frames)
    elif kind == "a header that lies":
        np.save(path, frames)
        path.write_bytes(path.read_bytes().replace(b"(12,", b"(99,"))
    elif kind == "a broken header":
        np.save(path, frames)
        path.write_bytes(path.read_bytes().replace(b"'shape'", b"('shape"))
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.write_text(kind)


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("float", "holds float32"),
        ("one picture", r"holds uint8 \(16, 20, 3\)"),
        ("four channels", r"\(4, 8, 8, 4\)"),
        ("no frame", r"\(0, 16, 20, 3\)"),
        ("objects", "damaged one: .*[Oo]bject"),
        ("cut", "damaged one"),
        ("an archive", "archive of arrays"),
        ("a header that lies", "damaged one"),
        ("a broken header", "damaged one"),
        ("a pipe", "is a pipe"),
        ("a folder", "is a folder"),
        ("", "damaged one"),
        ("some text", "damaged one"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, frames, kind, reason):
    path = tmp_path / "x.npy"
    spoil(path, kind, frames)
    for read in (count_frames, probe, read_video, lambda path: next(iter_frames(path))):
        with pytest.raises(VideoError, match=reason) as caught:
            read(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(VideoError, match=r"x\.npy: no such file"):
        count_frames(tmp_path / "x.npy")


def test_manifests_list_them_with_and_without_labels(tmp_path, clip, frames):
    rows = [
        {"path": "clip.npy", "label": "b", "split": "train", "group": "g1", "frames": 12},
        {"path": "more/other.npy", "caption": "something else", "split": "train"},
        {"path": "bad.npy", "split": "train"},
        {"path": "held.npy", "label": "a", "split": "validation"},
    ]
    (tmp_path / "more").mkdir()
    for row in rows[1:]:
        np.save(tmp_path / row["path"], frames)
    np.save(tmp_path / "bad.npy", frames.astype(np.int64))
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = f"jsonl:{tmp_path / 'clips.jsonl'}"
    videos = open_videos(spec)
    assert videos.classes == ("a", "b")
    assert [(item.label, item.caption, item.group) for item in videos.items] == [
        (1, "b", "g1"),
        (None, "something else", None),
        (None, None, None),
    ]
    assert [item.label for item in open_videos(spec, "validation").items] == [0]

    shape = ClipShape(8, 16, 16)
    once = iterate_once(videos, shape, batch=4)
    batch = next(iter(once))
    assert batch["label"].tolist() == [1, -1] and batch["caption"] == ["b", "something else"]
    assert [name for name, _ in once.skipped] == ["bad.npy"] and "int64" in once.skipped[0][1]
    for in_memory in (False, True):
        loader = ClipLoader(videos, shape, 4, 4, seed=0, in_memory=in_memory)
        assert next(iter(loader))["clip"].shape == (4, 3, 8, 16, 16)
    report = examine(spec)
    assert not report.ok and "bad.npy" in report.describe(10)
