"""The token cache and its extraction, on small rendered videos and a tiny tokenizer."""

import json
import os
import shutil
import threading
from dataclasses import replace
from itertools import islice

from larp.data import extraction, token_files
from larp.data import token_cache as tokens
from larp.data.clips import ClipShape, frames_to_clip
from larp.data.datasets import VideoItem, VideoSet
from larp.data.extraction import extract_tokens, live_batches, repeat_last, window_starts
from larp.data.loader import ClipLoader
from larp.data.token_cache import INDEX, TokenCache, TokenCacheError, batch_rows, shard_slices
from larp.data.video import read_video, write_video
from larp.engine import signals
from larp.hub import CheckpointError
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

LENGTHS = (4, 9, 13, 3, 8, 5, 6, 7, 4, 4, 10)
"""Frames of the videos; the fourth is shorter than a clip of 4."""


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("width", 16), ("depth", 1), ("heads", 2))
    }
    shape = dict(num_frames=4, height=16, width=16, patch_size=(2, 8, 8), num_tokens=5, codebook_size=64, code_dim=8)
    return LarpTokenizer(TokenizerConfig(**shape, **sides, prior=PriorConfig(enabled=False))).eval()


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> VideoSet:
    folder, random = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    items = []
    for number, frames in enumerate(LENGTHS):
        path = folder / f"{number}.mp4"
        write_video(path, random.integers(0, 255, (frames, 16, 16, 3), dtype=np.uint8), fps=8)
        items.append(VideoItem(path, f"v{number}", number % 2, f"video {number}"))
    (folder / "broken.mp4").write_bytes(b"\0\0\0\x20ftypisom nothing more")
    items.append(VideoItem(folder / "broken.mp4", "broken", 1, None))
    return VideoSet(tuple(items), ("even", "odd"), "test:")


def test_windows_never_overlap_and_are_evenly_spaced():
    shape = ClipShape(4, 8, 8, stride=2)
    assert window_starts(7, shape) == [0] and window_starts(6, shape, 3) == []
    assert window_starts(17, shape) == [5], "one window lies in the middle"
    assert window_starts(17, shape, most=2) == [1, 9] and window_starts(17, shape, most=9) == [1, 9]
    for frames in range(7, 80):
        starts = window_starts(frames, shape, most=5)
        gaps = np.diff([-7, *starts, frames]) - 7
        assert gaps.min() >= 0 and gaps.max() - gaps.min() <= 1, (frames, starts)


def test_windows_with_a_hop_start_at_the_first_frame():
    shape = ClipShape(4, 8, 8, stride=2)
    assert window_starts(40, shape, most=9, hop=7) == [0, 7, 14, 21, 28]
    assert window_starts(40, shape, most=2, hop=16) == [0, 16] and window_starts(39, shape, 9, hop=16) == [0, 16, 32]
    assert window_starts(38, shape, 9, hop=16) == [0, 16] and window_starts(6, shape, 9, hop=16) == []


def test_extraction_encodes_the_windows(tokenizer, videos, tmp_path):
    cache = extract_tokens(
        tokenizer,
        videos,
        "train",
        tmp_path,
        windows=2,
        flips=True,
        condition_frames=2,
        batch_size=3,
        tokenizer_name="runs/tok",
    )
    assert len(cache) == 2 * sum(min(2, length // 4) for length in LENGTHS) and cache.codes.shape[1] == 5
    assert cache.classes == ("even", "odd") and cache.tokenizer == "runs/tok"
    assert [name for name, _ in cache.skipped] == ["v3", "broken"] and "has 3 frames" in cache.skipped[0][1]
    for row in range(len(cache)):
        number, start = int(cache.videos[row]), int(cache.starts[row])
        item = videos.items[number]
        assert (cache.names[row], cache.captions[row], int(cache.labels[row])) == (item.name, item.caption, item.label)
        clip = frames_to_clip(read_video(item.path, start, 4)[0], 16, 16)[None]
        clip = clip.flip(-1) if cache.flipped[row] else clip
        assert torch.equal(tokenizer.encode(clip)[0], cache.codes[row].long())
        assert torch.equal(tokenizer.encode(repeat_last(clip, 2))[0], cache.conditions[row].long())


def test_augmented_clips_are_those_of_the_tokenizers_training_and_lie_where_the_cache_says(tokenizer, videos, tmp_path):
    options = dict(augmented=6, flips=True, condition_frames=2)
    cache = extract_tokens(tokenizer, videos, "train", tmp_path / "a", **options)
    readable = [number for number, length in enumerate(LENGTHS) if length >= 4]
    assert cache.videos.tolist() == [number for number in readable for _ in range(6)]
    assert [name for name, _ in cache.skipped] == ["v3", "broken"]
    assert 0.2 < cache.flipped.float().mean() < 0.8 and cache.key["augmented"] == 6
    assert (cache.starts + 4 <= torch.tensor(LENGTHS)[cache.videos]).all() and len(cache.starts.unique()) > 3
    # 13 frames have room for strides of 1, 2 and 3, 4 frames for 1 alone.
    assert {8.0, 4.0} < set(cache.fps[cache.videos == 2].tolist()) <= {8.0, 4.0, 8 / 3}
    assert cache.fps[cache.videos == 0].unique().tolist() == [8.0]
    again = extract_tokens(tokenizer, videos, "train", tmp_path / "b", batch_size=5, **options)
    assert torch.equal(again.codes, cache.codes) and torch.equal(again.conditions, cache.conditions)
    plain = extract_tokens(tokenizer, videos, "train", tmp_path / "c", augmented=6)
    assert not plain.flipped.any() and torch.equal(plain.codes[~cache.flipped], cache.codes[~cache.flipped])
    with pytest.raises(TokenCacheError, match="augmented is 6, expected 7"):
        extract_tokens(tokenizer, videos, "train", tmp_path / "c", augmented=7)


def test_joined_caches_hold_the_rows_and_the_classes_of_both(tokenizer, videos, tmp_path):
    first = extract_tokens(tokenizer, videos, "train", tmp_path / "a", condition_frames=2)
    items = tuple(replace(item, label=None if k == 1 else 1 - item.label) for k, item in enumerate(videos.items))
    other = replace(videos, items=items, classes=("odd", "square"))
    second = extract_tokens(tokenizer, other, "train", tmp_path / "b", windows=2, condition_frames=2)
    both = first.joined(second)
    assert len(both) == len(first) + len(second) and both.classes == ("even", "odd", "square")
    assert torch.equal(both.codes[len(first) :], second.codes) and torch.equal(
        both.conditions[: len(first)], first.conditions
    )
    names = [None if label < 0 else second.classes[label] for label in second.labels]
    assert [None if label < 0 else both.classes[label] for label in both.labels[len(first) :]] == names
    assert not set(both.videos[: len(first)].tolist()) & set(both.videos[len(first) :].tolist())
    assert both.names[len(first) :] == second.names and both.captions[: len(first)] == first.captions
    with pytest.raises(TokenCacheError, match="condition_frames is 0, expected 2"):
        first.joined(extract_tokens(tokenizer, videos, "train", tmp_path / "c"))


def test_the_hop_is_used_and_is_part_of_the_key(tokenizer, videos, tmp_path):
    cache = extract_tokens(tokenizer, videos, "train", tmp_path, windows=9, hop=5)
    assert cache.starts[cache.videos == 2].tolist() == [0, 5] and cache.starts[cache.videos == 0].tolist() == [0]
    with pytest.raises(TokenCacheError, match="hop is 5, expected 6"):
        extract_tokens(tokenizer, videos, "train", tmp_path, windows=9, hop=6)


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_a_number_of_frames_that_overstates_is_corrected(videos, windows, monkeypatch):
    times = extraction.frame_times(videos.items[2].path)
    assert times.count == 13
    monkeypatch.setattr(extraction, "frame_times", lambda path: replace(times, count=20))
    found = extraction.read_windows(videos.items[2], ClipShape(4, 16, 16), windows)
    pixels = read_video(videos.items[2].path)[0]
    assert [window.start for window in found] == window_starts(
        20 if windows == 1 else 13, ClipShape(4, 16, 16), windows
    )
    for window in found:
        assert torch.equal(window.clip, frames_to_clip(pixels[window.start : window.start + 4], 16, 16))


def test_rows_have_a_frame_rate_and_old_caches_have_none(tokenizer, videos, tmp_path):
    write_video(tmp_path / "fast.mp4", np.zeros((8, 16, 16, 3), np.uint8), fps=30000 / 1001)
    some = replace(videos, items=(*videos.items[1:3], VideoItem(tmp_path / "fast.mp4", "fast")))
    cache = extract_tokens(tokenizer, some, "train", tmp_path / "cache", stride=2)
    assert cache.fps.tolist() == pytest.approx([4, 4, 15 / 1.001]) and cache.frame_rate(default=12) == 4
    assert cache.select(torch.tensor([2])).frame_rate(default=12) == pytest.approx(15 / 1.001)
    shard = tmp_path / "cache" / "shard-00000.safetensors"
    columns, notes = tokens.read_shard(shard)
    del columns["fps"]
    tokens.write_shard(shard, columns, notes["videos"], notes["skipped"])
    old = TokenCache.open(tmp_path / "cache")
    assert old.fps.isnan().all() and old.frame_rate(default=12) == 12 and torch.equal(old.codes, cache.codes)


def test_a_cache_loads_the_tokenizer_and_variant_that_made_it(tokenizer, videos, tmp_path):
    torch.manual_seed(1)
    average = LarpTokenizer(tokenizer.config).eval()
    assert average.weight_hash() != tokenizer.weight_hash()
    home = str(tokenizer.save_pretrained(tmp_path / "tok", ema=average))
    settings = dict(tokenizer_name=home, variant="ema")
    cache = extract_tokens(average, videos, "train", tmp_path / "cache", **settings)
    assert cache.variant == "ema" and cache.load_tokenizer().weight_hash() == average.weight_hash()
    assert cache.load_tokenizer(home).weight_hash() == average.weight_hash()
    plain = extract_tokens(tokenizer, videos, "train", tmp_path / "plain", tokenizer_name=home)
    assert plain.variant is None and plain.load_tokenizer().weight_hash() == tokenizer.weight_hash()
    with pytest.raises(CheckpointError, match="absent"):
        cache.load_tokenizer(tmp_path / "absent")
    tokenizer.save_pretrained(tmp_path / "tok")
    with pytest.raises(
        TokenCacheError, match=r"cache names its tokenizer as it was given at extraction: .*give --tokenizer"
    ):
        cache.load_tokenizer()
    average.save_pretrained(tmp_path / "tok")
    with pytest.raises(
        TokenCacheError, match=r"plain was made from something else: tokenizer is .* give the --tokenizer"
    ):
        plain.load_tokenizer()


def test_ranks_share_the_work_and_a_stopped_extraction_resumes(tokenizer, videos, tmp_path, monkeypatch):
    whole = extract_tokens(tokenizer, videos, "train", tmp_path / "one")
    assert len(shard_slices(len(videos))) == 2
    with pytest.raises(TokenCacheError, match="1 shards are missing"):
        extract_tokens(tokenizer, videos, "train", tmp_path / "two", rank=0, world_size=2)
    with pytest.raises(TokenCacheError, match="is unfinished: run the extraction again"):
        TokenCache.open(tmp_path / "two")
    first = (tmp_path / "two" / "shard-00000.safetensors").stat().st_mtime_ns
    resumed = extract_tokens(tokenizer, videos, "train", tmp_path / "two")
    assert (tmp_path / "two" / "shard-00000.safetensors").stat().st_mtime_ns == first, "finished shards are kept"
    assert torch.equal(resumed.codes, whole.codes) and resumed.key == whole.key and resumed.skipped == whole.skipped
    monkeypatch.setattr(tokenizer, "encode", None)
    again = extract_tokens(tokenizer, videos, "train", tmp_path / "two")
    assert torch.equal(again.codes, whole.codes), "a finished cache is only opened"


def test_a_cache_of_other_data_is_refused(tokenizer, videos, tmp_path):
    extract_tokens(tokenizer, videos, "train", tmp_path)
    TokenCache.open(tmp_path, {"tokenizer": tokenizer.weight_hash(), "flips": False})
    with pytest.raises(TokenCacheError, match=r"windows is 1, expected 2; flips is False, expected True"):
        TokenCache.open(tmp_path, {"windows": 2, "flips": True, "stride": 1})
    with pytest.raises(TokenCacheError, match=r"split is 'train', expected 'test'.*choose another --out"):
        extract_tokens(tokenizer, videos, "test", tmp_path)
    with pytest.raises(TokenCacheError, match=r"holds no token cache: make one with"):
        TokenCache.open(tmp_path / "absent")
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps(index | {"key": index["key"] | {"code_version": 0}}))
    with pytest.raises(TokenCacheError, match=r"code_version is 0, expected 1.*extract the tokens again"):
        TokenCache.open(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(index))
    shard = tmp_path / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(TokenCacheError, match=r"shard-00000.*delete this file"):
        TokenCache.open(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(TokenCacheError, match=r"index.json cannot be read"):
        TokenCache.open(tmp_path)


def test_a_replaced_video_makes_another_cache(tokenizer, videos, tmp_path):
    path = tmp_path / "v.mp4"
    shutil.copy(videos.items[0].path, path)
    one = VideoSet((replace(videos.items[0], path=path),), videos.classes, "test:")
    old = extract_tokens(tokenizer, one, "train", tmp_path / "cache")
    assert torch.equal(extract_tokens(tokenizer, one, "train", tmp_path / "cache").codes, old.codes)
    times = path.stat()
    shutil.copy(videos.items[1].path, path)
    with pytest.raises(TokenCacheError, match=r"videos is '1 videos .*choose another --out, or delete.*replaced"):
        extract_tokens(tokenizer, one, "train", tmp_path / "cache")
    assert not torch.equal(extract_tokens(tokenizer, one, "train", tmp_path / "new").codes, old.codes)
    shutil.copy(videos.items[0].path, path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    with pytest.raises(TokenCacheError, match="replaced or touched"):
        extract_tokens(tokenizer, one, "train", tmp_path / "cache")
    path.unlink()
    with pytest.raises(TokenCacheError, match="replaced or touched"):
        extract_tokens(tokenizer, one, "train", tmp_path / "cache")


def test_unreadable_videos_are_named_and_tried_again(tokenizer, videos, tmp_path):
    path, folder = tmp_path / "broken.mp4", tmp_path / "cache"
    shutil.copy(videos.items[-1].path, path)
    broken = VideoSet((replace(videos.items[-1], path=path),), (), "test:")
    for _ in range(2):
        with pytest.raises(TokenCacheError, match=rf"not one video could be encoded.*broken.*left in {folder}: mend"):
            extract_tokens(tokenizer, broken, "train", folder)
        assert not list(folder.iterdir())
    shutil.copy(videos.items[0].path, path)
    assert extract_tokens(tokenizer, broken, "train", folder).names == ("broken",)


def test_every_rank_raises_if_no_video_is_readable(tokenizer, videos, tmp_path, monkeypatch):
    lock, write = threading.Lock(), tokens.write_json

    def write_alone(*arguments) -> None:  # real ranks have a process id each, by which they keep apart
        with lock:
            write(*arguments)

    monkeypatch.setattr(tokens, "write_json", write_alone)
    broken = VideoSet(tuple(replace(videos.items[-1], name=f"b{k}") for k in range(16)), (), "test:")
    ranks, errors = threading.Barrier(2, timeout=20), []

    def work(rank: int) -> None:
        try:
            extract_tokens(tokenizer, broken, "train", tmp_path, rank=rank, world_size=2, barrier=ranks.wait)
        except TokenCacheError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(errors) == 2 and errors[0] == errors[1] and "not one video" in errors[0]


def test_a_folder_that_cannot_be_written_is_named(tokenizer, videos, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TokenCacheError, match=rf"no token cache can be written to {folder} .*choose another --out"):
            extract_tokens(tokenizer, videos, "train", folder)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "option, words",
    [
        ({"windows": 0}, "windows is 0"),
        ({"stride": 0}, "stride"),
        ({"hop": 3}, "hop is 3: windows reach over 4 frames and would overlap"),
        ({"condition_frames": 4}, "0 .none. to 3.*frame prediction needs 1 at least"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"augmented": 2, "windows": 2}, "leave out windows and hop"),
        ({"augmented": -1}, "augmented is -1"),
    ],
)
def test_bad_options(tokenizer, videos, tmp_path, option, words):
    with pytest.raises(ValueError, match=words):
        extract_tokens(tokenizer, videos, "train", tmp_path, **option)


def test_live_batches_equal_the_codes_of_a_cache(tokenizer, videos):
    def loader(rank=0, world_size=1) -> ClipLoader:
        shape = ClipShape(4, 16, 16)
        return ClipLoader(videos, shape, 8, 4, seed=3, rank=rank, world_size=world_size, flip=True)

    live = live_batches(tokenizer, loader(), "frame-prediction", condition_frames=2)
    for clips, (codes, condition) in zip(islice(loader(), 6), live, strict=False):
        assert torch.equal(codes, tokenizer.encode(clips["clip"]))
        assert torch.equal(condition[:, :-1], tokenizer.encode(repeat_last(clips["clip"], 2)))
        assert (condition[:, -1] == tokenizer.codebook_size).all()
    one = list(islice(live_batches(tokenizer, loader(), "class"), 4))
    two = [list(islice(live_batches(tokenizer, loader(rank, 2), "class"), 2)) for rank in (0, 1)]
    for whole, part in zip(one, (two[0][0], two[1][0], two[0][1], two[1][1]), strict=True):
        assert torch.equal(whole[0], part[0]) and torch.equal(whole[1], part[1])
    assert not torch.equal(torch.cat([codes for codes, _ in one[:2]]), torch.cat([codes for codes, _ in one[2:]]))
    with pytest.raises(ValueError, match="condition_frames is 0; it must be 1 to 3"):
        next(live_batches(tokenizer, loader(), "frame-prediction"))
    unlabelled = replace(videos, items=tuple(replace(item, label=None) for item in videos.items))
    with pytest.raises(ValueError, match="has no class"):
        next(live_batches(tokenizer, ClipLoader(unlabelled, ClipShape(4, 16, 16), 4, 4, seed=0), "class"))


def test_hold_out_keeps_videos_whole(tokenizer, videos, tmp_path):
    cache = extract_tokens(tokenizer, videos, "train", tmp_path, windows=2)
    train, held = cache.hold_out(every=3)
    assert len(train) + len(held) == len(cache) and set(held.names) == {"v2", "v5", "v8"}
    assert not set(train.names) & set(held.names) and train.codes.shape[0] == len(train.captions) == len(train.labels)
    with pytest.raises(
        TokenCacheError, match=rf"{tmp_path} holds 10 videos, too few .* one in 50: .*--eval-tokens DIR"
    ):
        cache.hold_out(50)


def test_shards_cover_every_video_once():
    for count in (1, 8, 700, 100_000):
        slices = shard_slices(count)
        assert [number for part in slices for number in part] == list(range(count)) and len(slices) < 300


def test_batches_cover_each_epoch_in_a_new_order():
    rows = torch.cat([batch_rows(10, step, 4, seed=1) for step in range(5)])
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()
    assert torch.equal(batch_rows(10, 3, 4, seed=1), rows[12:16]), "any step can be asked for alone"
    assert not torch.equal(batch_rows(10, 0, 10, seed=1), batch_rows(10, 0, 10, seed=2))


def test_index_is_plain_json(tokenizer, videos, tmp_path):
    extract_tokens(tokenizer, videos, "train", tmp_path)
    key = json.loads((tmp_path / INDEX).read_text())["key"]
    assert key["data"] == "test:" and key["num_tokens"] == 5 and key["height"] == 16 and key["code_version"] == 1


def test_a_full_disk_leaves_whole_shards(tokenizer, videos, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(token_files, "save_file", full)
        with pytest.raises(
            TokenCacheError, match=r"shard-00000\.safetensors cannot be written \(No space left on device\)"
        ):
            extract_tokens(tokenizer, videos, "all", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [tokens.KEY]
    assert len(extract_tokens(tokenizer, videos, "all", tmp_path))


def test_extraction_is_stopped_between_videos(tokenizer, videos, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stopped:
        patch.setattr(signals, "_requested", threading.Event())
        patch.setattr(signals, "_stopped_by", 15)
        signals._requested.set()
        extract_tokens(tokenizer, videos, "all", tmp_path, check_stop=signals.check_stop)
    assert stopped.value.args == (15,) and len(extract_tokens(tokenizer, videos, "all", tmp_path))
