"""Clips cut from videos in memory: their contents, which depend on the seed and the global position only."""

import itertools
import json

from larp.data import in_memory_clips as resident
from larp.data.clips import ClipShape
from larp.data.datasets import VideoItem, VideoSet
from larp.data.in_memory_clips import ResidentClips
from larp.data.loader import ClipLoader
from larp.data.video import write_video

import numpy as np
import pytest
import torch

SHAPE = ClipShape(frames=4, height=16, width=16)
NAMES = ("index", "label", "clip")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Six videos of 9 + k frames: brighter from left to right, from top to bottom and with time."""
    folder = tmp_path_factory.mktemp("videos")
    items = []
    for k in range(6):
        frames = np.zeros((9 + k, 42, 42, 3), np.uint8)
        frames += (3 * np.arange(42)[:, None] + 40).astype(np.uint8)[None, None]
        frames += (4 * np.arange(9 + k)).astype(np.uint8)[:, None, None, None]
        frames += np.arange(42).astype(np.uint8)[None, :, None, None]
        write_video(folder / f"{k}.mp4", frames, 10)
        items.append(VideoItem(folder / f"{k}.mp4", f"{k}.mp4", k % 2, f"video {k}"))
    return VideoSet(tuple(items), ("even", "odd"), "test")


def take(loader, count):
    return list(itertools.islice(loader, count))


def joined(batches):
    return {name: torch.cat([batch[name] for batch in batches]) for name in NAMES}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in NAMES)


def plain(monkeypatch, whole=1.0, brightness=0.0, strides=1):
    """Disable all augmentation except the position of the window, or enable a part of it."""
    monkeypatch.setattr(resident, "_WHOLE_FRAME_SHARE", whole)
    monkeypatch.setattr(resident, "_BRIGHTNESS", brightness)
    monkeypatch.setattr(resident, "_REVERSED_SHARE", 0.0)
    monkeypatch.setattr(resident, "_MAX_STRIDE", strides)


def test_batch_contents(videos):
    batch = take(ResidentClips(videos, SHAPE, 4, 4, seed=0), 1)[0]
    assert batch["clip"].shape == (4, 3, 4, 16, 16) and batch["clip"].dtype == torch.float32
    assert batch["clip"].min() >= 0 and batch["clip"].max() <= 1
    assert batch["sample_offset"] == batch["step"] == 0
    for index, label, caption in zip(batch["index"], batch["label"], batch["caption"], strict=True):
        assert caption == f"video {index}" and label == index % 2


def test_every_epoch_holds_every_video_once(videos):
    index = joined(take(ResidentClips(videos, SHAPE, 3, 3, seed=0), 4))["index"]
    assert index[:6].sort().values.tolist() == index[6:].sort().values.tolist() == list(range(6))
    assert index[:6].tolist() != index[6:].tolist()


@pytest.mark.parametrize("micro", [1, 2])
def test_rows_are_the_same_for_any_ranks_and_micro_batches(videos, micro):
    whole = joined(take(ResidentClips(videos, SHAPE, 4, 4, seed=3, flip=True), 3))
    parts = [take(ResidentClips(videos, SHAPE, 4, micro, 3, rank, 2, flip=True), 3 * 2 // micro) for rank in range(2)]
    each = 2 // micro
    ordered = [batch for step in range(3) for part in parts for batch in part[step * each : (step + 1) * each]]
    assert same(joined(ordered), whole)
    assert [batch["sample_offset"] for batch in ordered[: 4 // micro]] == list(range(0, 4, micro))


def test_another_seed_and_another_epoch_give_other_clips(videos):
    one, other = (joined(take(ResidentClips(videos, SHAPE, 6, 6, seed), 2)) for seed in (0, 1))
    assert not same(one, other)
    clips = dict(zip(one["index"][:6].tolist(), one["clip"][:6], strict=True))
    again = dict(zip(one["index"][6:].tolist(), one["clip"][6:], strict=True))
    assert not any(torch.equal(clips[index], again[index]) for index in range(6))


def test_a_whole_frame_equals_the_clip_of_the_plain_loader(videos, monkeypatch):
    plain(monkeypatch)
    monkeypatch.setattr(resident, "_MARGIN", 1)
    wanted = {}
    for batch in take(ClipLoader(videos, SHAPE, 6, 6, seed=0), 250):
        for index, clip in zip(batch["index"].tolist(), batch["clip"], strict=True):
            wanted.setdefault(index, set()).add(clip.numpy().tobytes())
    batch = take(ResidentClips(videos, SHAPE, 6, 6, seed=0), 1)[0]
    for index, clip in zip(batch["index"].tolist(), batch["clip"], strict=True):
        assert clip.numpy().tobytes() in wanted[index], "one of the windows that decoding gives, to the last bit"


def test_a_whole_frame_with_margin_is_close_to_the_clip_of_the_plain_loader(videos, monkeypatch):
    plain(monkeypatch)
    batch = take(ResidentClips(videos, SHAPE, 6, 6, seed=0), 1)[0]
    for index, clip in zip(batch["index"].tolist(), batch["clip"], strict=True):
        one = VideoSet((videos.items[index],), videos.classes, "test")
        windows = torch.cat([b["clip"] for b in take(ClipLoader(one, SHAPE, 8, 8, seed=0), 20)])
        assert (windows - clip).abs().amax(dim=(1, 2, 3, 4)).min() < 0.03


def test_crops_differ_in_size_and_place(videos, monkeypatch):
    plain(monkeypatch, whole=0.0)
    clips = joined(take(ResidentClips(videos, SHAPE, 12, 12, seed=0), 8))["clip"]
    # What the frame spans from left to right is what the crop covers of it.
    spans = (clips[..., -1] - clips[..., 0]).mean(dim=(1, 2, 3))
    assert spans.max() / spans.min() > 1.15
    corners = clips[:, 0, 0, 0, 0]
    assert corners.std() > 0.01 and len(spans.round(decimals=2).unique()) >= 5


def test_brightness_and_speed_vary(videos, monkeypatch):
    plain(monkeypatch, brightness=0.1)
    first = joined(take(ResidentClips(videos, SHAPE, 12, 12, seed=0), 4))["clip"]
    monkeypatch.setattr(resident, "_BRIGHTNESS", 0.0)
    second = joined(take(ResidentClips(videos, SHAPE, 12, 12, seed=0), 4))["clip"]
    ratios = (first.mean(dim=(2, 3, 4)) / second.mean(dim=(2, 3, 4))).numpy()
    assert 0.89 < ratios.min() < 0.95 and 1.05 < ratios.max() < 1.11
    assert (ratios.max(1) - ratios.min(1)).max() > 0.05, "each colour by a number of its own"
    monkeypatch.setattr(resident, "_MAX_STRIDE", 3)
    third = joined(take(ResidentClips(videos, SHAPE, 12, 12, seed=0), 4))["clip"]
    change = (third[:, 0, -1] - third[:, 0, 0]).mean(dim=(1, 2)) * 255
    assert {round(value / 12) for value in change.tolist()} == {1, 2, 3}, "4 more a frame, over 3 frames"
    monkeypatch.setattr(resident, "_REVERSED_SHARE", 0.25)
    fourth = joined(take(ResidentClips(videos, SHAPE, 12, 12, seed=0), 4))["clip"]
    backwards = (fourth == third.flip(2)).flatten(1).all(1)
    assert 4 <= backwards.sum() <= 20 and torch.equal(fourth[~backwards], third[~backwards])


def test_half_of_the_clips_are_mirrored(videos):
    straight = joined(take(ResidentClips(videos, SHAPE, 12, 12, seed=0), 8))["clip"]
    turned = joined(take(ResidentClips(videos, SHAPE, 12, 12, seed=0, flip=True), 8))["clip"]
    alike = [torch.equal(a, b) for a, b in zip(straight, turned, strict=True)]
    assert all(torch.equal(b, a if k else a.flip(-1)) for a, b, k in zip(straight, turned, alike, strict=True))
    assert 0.3 < sum(alike) / len(alike) < 0.7


def test_videos_that_cannot_be_used_are_skipped(videos, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    write_video(tmp_path / "short.mp4", np.zeros((3, 16, 16, 3), np.uint8), 10)
    items = list(videos.items)
    items[1] = VideoItem(tmp_path / "broken.mp4", "broken.mp4", 1)
    items[4] = VideoItem(tmp_path / "short.mp4", "short.mp4", 0)
    loader = ResidentClips(VideoSet(tuple(items), videos.classes, "test"), SHAPE, 4, 4, seed=0)
    batch = joined(take(loader, 2))
    assert sorted(batch["index"].tolist()[:4]) == sorted(batch["index"].tolist()[4:]) == [0, 2, 3, 5]
    assert [name for name, _ in loader.skipped] == ["broken.mp4", "short.mp4"]


def test_a_saved_loader_resumes_with_the_next_batch(videos):
    loader = ResidentClips(videos, SHAPE, 4, 2, seed=0)
    batches = iter(loader)
    take(batches, 3)
    state = json.loads(json.dumps(loader.state_dict()))
    wanted = take(batches, 2)
    again = ResidentClips(videos, SHAPE, 4, 2, seed=0)
    again.load_state_dict(state)
    assert same(joined(take(again, 2)), joined(wanted))
    with pytest.raises(ValueError, match="crop: saved None, now True"):
        again.load_state_dict(ClipLoader(videos, SHAPE, 4, 2, seed=0).state_dict())
    with pytest.raises(ValueError, match="clip_shape"):
        ResidentClips(videos, ClipShape(4, 8, 8), 4, 2, seed=0).load_state_dict(state)


def test_videos_beyond_the_memory_are_refused(videos, monkeypatch):
    monkeypatch.setattr(resident, "_MAX_MEMORY_GB", 1e-6)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="train without --crop"):
        ResidentClips(videos, SHAPE, 4, 4, seed=0)
