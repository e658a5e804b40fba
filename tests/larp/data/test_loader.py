"""Batches depend on the seed and the global position only; also `in_order`."""

import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from larp.data.clips import ClipShape, frames_to_clip
from larp.data.datasets import VideoItem, VideoSet, open_videos
from larp.data.loader import ClipLoader, in_order, iterate_once
from larp.data.video import VideoError, read_video, write_video

import numpy as np
import pytest
import torch

SHAPE = ClipShape(frames=4, height=16, width=16)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Seven videos of 9 + k frames whose brightness grows with time and whose left half is dark."""
    folder = tmp_path_factory.mktemp("videos")
    items = []
    for k in range(7):
        frames = np.zeros((9 + k, 20, 24, 3), np.uint8)
        frames[:, :, 12:] = 10 * np.arange(9 + k)[:, None, None, None] + 60
        write_video(folder / f"{k}.mp4", frames, 10)
        items.append(VideoItem(folder / f"{k}.mp4", f"{k}.mp4", k % 2, f"video {k}"))
    return VideoSet(tuple(items), ("even", "odd"), "test")


@pytest.fixture
def with_bad(videos, tmp_path):
    """The seven videos, one of them replaced by a broken file and one by a short one."""
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    write_video(tmp_path / "short.mp4", np.zeros((3, 16, 16, 3), np.uint8), 10)
    items = list(videos.items)
    items[2] = VideoItem(tmp_path / "broken.mp4", "broken.mp4")
    items[5] = VideoItem(tmp_path / "short.mp4", "short.mp4")
    return VideoSet(tuple(items), videos.classes, "test")


def take(loader, count):
    return list(itertools.islice(loader, count))


def same(a, b):
    return torch.equal(a["clip"], b["clip"]) and torch.equal(a["index"], b["index"]) and a["caption"] == b["caption"]


def test_batch_contents(videos):
    batch = take(ClipLoader(videos, SHAPE, 3, 3, seed=0), 1)[0]
    assert batch["clip"].shape == (3, 3, 4, 16, 16) and batch["clip"].dtype == torch.float32
    assert batch["clip"].min() >= 0 and batch["clip"].max() <= 1
    assert batch["label"].dtype == batch["index"].dtype == torch.int64 and batch["sample_offset"] == batch["step"] == 0
    for index, label, caption in zip(batch["index"], batch["label"], batch["caption"], strict=True):
        assert caption == f"video {index}" and label == index % 2


def test_the_clips_of_a_step_are_named_without_reading_them(videos):
    loader = ClipLoader(videos, SHAPE, 4, 2, seed=0, rank=1, world_size=2)
    whole = ClipLoader(videos, SHAPE, 4, 4, seed=0)
    read = [[videos.items[i].name for i in batch["index"]] for batch in take(whole, 5)]
    assert [loader.clips_of(step) for step in range(5)] == [whole.clips_of(step) for step in range(5)] == read


def test_every_epoch_holds_every_video_once_in_a_new_order(videos):
    epochs = [
        [int(b["index"]) for b in take(loader, 7)] for loader in [iter(ClipLoader(videos, SHAPE, 1, 1, seed=0))] * 3
    ]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and epochs[0] != epochs[1]
    assert [int(b["index"]) for b in take(ClipLoader(videos, SHAPE, 1, 1, seed=0, shuffle=False), 9)] == [
        *range(7),
        0,
        1,
    ]


@pytest.mark.parametrize("options", [{"workers": 1}, {"workers": 3}, {"in_memory": True}])
def test_workers_and_memory_change_nothing(videos, options):
    plain = take(ClipLoader(videos, SHAPE, 4, 4, seed=1, flip=True), 8)
    other = take(ClipLoader(videos, SHAPE, 4, 4, seed=1, flip=True, **options), 8)
    assert all(same(a, b) for a, b in zip(plain, other, strict=True))
    assert not same(plain[0], take(ClipLoader(videos, SHAPE, 4, 4, seed=2, flip=True), 1)[0])


def test_two_ranks_and_accumulation_see_the_rows_of_one(videos):
    whole = take(ClipLoader(videos, SHAPE, 8, 8, seed=0), 4)
    parts = [take(ClipLoader(videos, SHAPE, 8, 2, seed=0, rank=rank, world_size=2), 8) for rank in (0, 1)]
    for step in range(4):
        rows = [parts[rank][2 * step + micro] for rank in (0, 1) for micro in (0, 1)]
        assert torch.equal(torch.cat([row["clip"] for row in rows]), whole[step]["clip"])
        assert [row["sample_offset"] for row in rows] == [0, 2, 4, 6] and {row["step"] for row in rows} == {step}


def test_batches_that_do_not_divide_are_refused(videos):
    with pytest.raises(ValueError, match=r"global_batch=8 must be a multiple of micro_batch=3 x world_size=2"):
        ClipLoader(videos, SHAPE, 8, 3, seed=0, world_size=2)
    with pytest.raises(ValueError, match=r"the set holds no video"):
        ClipLoader(VideoSet((), (), "folder:x"), SHAPE, 8, 8, seed=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_is_exact(videos, workers):
    loader = ClipLoader(videos, SHAPE, 4, 2, seed=0, workers=workers)
    batches = iter(loader)
    take(batches, 5)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = take(batches, 4)
    again = ClipLoader(videos, SHAPE, 4, 2, seed=0)
    again.load_state_dict(state)
    got = take(again, 4)
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))
    assert [b["step"] for b in got] == [2, 3, 3, 4] and [b["sample_offset"] for b in got] == [2, 0, 2, 0]


def test_resuming_on_other_ranks_works_at_whole_steps_only(videos):
    loader = ClipLoader(videos, SHAPE, 4, 2, seed=0)
    batches = iter(loader)
    take(batches, 1)
    two = ClipLoader(videos, SHAPE, 4, 1, seed=0, rank=1, world_size=2)
    with pytest.raises(ValueError, match=r"saved within a step at micro_batch=2"):
        two.load_state_dict(loader.state_dict())
    take(batches, 1)
    two.load_state_dict(loader.state_dict())
    assert torch.equal(take(two, 1)[0]["clip"][0], take(loader, 2)[1]["clip"][0])


def test_resuming_with_other_data_names_the_differences(videos):
    state = ClipLoader(videos, SHAPE, 4, 4, seed=0).state_dict()
    with pytest.raises(ValueError, match=r"cannot resume.*seed: saved 0, now 1\. Give the options of the"):
        ClipLoader(videos, SHAPE, 4, 4, seed=1).load_state_dict(state)
    fewer = VideoSet(videos.items[:3], videos.classes, "test")
    with pytest.raises(ValueError, match=r"videos: saved"):
        ClipLoader(fewer, SHAPE, 4, 4, seed=0).load_state_dict(state)


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"in_memory": True}])
def test_unusable_videos_are_replaced_and_listed(with_bad, options):
    loader = ClipLoader(with_bad, SHAPE, 7, 7, seed=0, **options)
    batches = take(loader, 3)
    assert all(b["clip"].shape[0] == 7 and not {2, 5} & set(b["index"].tolist()) for b in batches)
    assert [name for name, _ in loader.skipped] == ["broken.mp4", "short.mp4"]
    assert (
        loader.skipped[0][1].startswith("does not begin like")
        and loader.skipped[1][1] == "has 3 frames, the clip needs 4"
    )
    plain = take(ClipLoader(with_bad, SHAPE, 7, 7, seed=0), 3)
    assert all(same(a, b) for a, b in zip(plain, batches, strict=True))


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"in_memory": True}])
def test_nothing_readable_is_an_error(with_bad, options):
    bad = VideoSet((with_bad.items[2], with_bad.items[5]), (), "folder:bad")
    with pytest.raises(VideoError, match=r"folder:bad: none of the 2 videos can be used; the first, broken.mp4"):
        take(ClipLoader(bad, SHAPE, 2, 2, seed=0, **options), 1)


def test_memory_budget_falls_back_with_a_warning(videos):
    with pytest.warns(UserWarning, match=r"over memory_gb=1e-05; decoding on the fly"):
        loader = ClipLoader(videos, SHAPE, 4, 4, seed=0, in_memory=True, memory_gb=1e-5)
    assert same(take(loader, 1)[0], take(ClipLoader(videos, SHAPE, 4, 4, seed=0), 1)[0])


def test_flips_mirror_half_of_the_clips(videos):
    plain = torch.cat([b["clip"] for b in take(ClipLoader(videos, SHAPE, 8, 8, seed=0), 8)])
    flipped = torch.cat([b["clip"] for b in take(ClipLoader(videos, SHAPE, 8, 8, seed=0, flip=True), 8)])
    mirrored = [not torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert 16 < sum(mirrored) < 48
    assert all(torch.equal(b, a.flip(-1) if m else a) for a, b, m in zip(plain, flipped, mirrored, strict=True))


def test_starts_are_random_or_centred(videos):
    def level(loader, count):
        return {round(float(b["clip"][0, :, 0, :, -1].mean()), 2) for b in take(loader, count)}

    one = VideoSet(videos.items[-1:], videos.classes, "test")
    assert len(level(ClipLoader(one, SHAPE, 1, 1, seed=0), 40)) > 8
    assert len(level(ClipLoader(one, SHAPE, 1, 1, seed=0, shuffle=False), 5)) == 1


def test_stride_takes_every_second_frame(videos):
    shape = ClipShape(4, 20, 24, stride=2)
    batch = next(iter(iterate_once(videos, shape, 1, start=1)))
    frames, _ = read_video(videos.items[0].path, 1, 4, 2)
    assert torch.equal(batch["clip"][0], frames_to_clip(frames, 20, 24))


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_a_fixed_pass_covers_every_video_once(videos, world_size):
    passes = [iterate_once(videos, SHAPE, 2, rank, world_size, workers=rank % 2 * 2) for rank in range(world_size)]
    batches = [list(one) for one in passes]
    assert [int(i) for rank in batches for b in rank for i in b["index"]] == list(range(7))
    assert [len(one) for one in passes] == [len(rank) for rank in batches]


def test_a_fixed_pass_repeats_itself_and_lists_what_it_skipped(with_bad):
    one = iterate_once(with_bad, SHAPE, 4, start="random", seed=3)
    first, second = list(one), list(one)
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert [int(i) for b in first for i in b["index"]] == [0, 1, 3, 4, 6] and len(one.skipped) == 2
    other = list(iterate_once(with_bad, SHAPE, 4, start="random", seed=4))
    assert not all(same(a, b) for a, b in zip(first, other, strict=True))
    with pytest.raises(ValueError, match=r"start='end'; choose centre, random, or a frame number"):
        iterate_once(with_bad, SHAPE, 4, start="end")


def test_leaving_a_loader_in_the_middle_leaves_no_thread_behind(videos):
    before = threading.active_count()
    batches = iter(ClipLoader(videos, SHAPE, 4, 4, seed=0, workers=3))
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_real_clips_in_memory_and_from_files(clips_root):
    everything = open_videos(f"ucf101:{clips_root / 'ucf101_original'}", "test")
    few = VideoSet(everything.items[::3], everything.classes, everything.spec)
    shape = ClipShape(16, 32, 32)
    a, b = (take(ClipLoader(few, shape, 6, 6, seed=0, in_memory=memory, workers=2), 2) for memory in (True, False))
    assert all(same(x, y) for x, y in zip(a, b, strict=True)) and a[0]["clip"].std() > 0.05


def test_odd_files_beside_good_ones(clips_root):
    one = iterate_once(open_videos(f"folder:{clips_root / 'odd'}", "all"), ClipShape(16, 32, 32), 4)
    assert sum(len(b["index"]) for b in one) == 7
    assert {name: reason.split(":")[0] for name, reason in one.skipped} == {
        "-video-with-dash-.mp4": "has 5 frames, the clip needs 16", "corrupted.mp4": "cannot be decoded",
        "h265_video.mp4": "has 10 frames, the clip needs 16", "video_0.mov": "has 3 frames, the clip needs 16",
        "video_90.mov": "has 3 frames, the clip needs 16",
    }  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_are_in_order_and_few_are_computed_ahead(workers):
    begun, lock = [], threading.Lock()

    def square(number: int) -> int:
        with lock:
            begun.append(number)
        return number * number

    results = in_order(square, range(100), workers, ahead=2)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert len(begun) <= 5 + 2 * workers + 1
    assert list(results) == [number * number for number in range(5, 100)]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_is_raised_at_the_position_of_its_result(workers):
    results = in_order(lambda number: 1 // (number - 3), range(9), workers)
    assert [next(results) for _ in range(3)] == [-1, -1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_closing_waits_for_running_calls_and_cancels_the_others():
    ended = []

    def slow(number: int) -> None:
        time.sleep(0.1 * number)
        ended.append(number)

    results = in_order(slow, range(9), 2)
    next(results)
    results.close()
    before = list(ended)
    time.sleep(0.3)
    assert ended == before and 1 in ended and 8 not in ended


def test_ctrl_c_twice_leaves_no_thread_behind():
    """torch aborts the process if a thread still runs when the interpreter exits."""
    code = (
        "import signal, time; from larp.data.loader import in_order\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def call(_): print('running', flush=True); time.sleep(1.5); print('done', flush=True)\n"
        "for _ in in_order(call, range(9), 1): pass"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[3],
    )
    assert process.stdout.readline() == "running\n"
    for _ in range(2):
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=60)
    assert said == "done\n" and error.rstrip().endswith("KeyboardInterrupt")
