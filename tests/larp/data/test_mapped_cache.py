"""Token caches that stay in their files equal those in memory, and machines that share an extraction."""

import io
import json
import tarfile
from dataclasses import replace

from larp.data import token_cache as tokens
from larp.data.datasets import open_videos
from larp.data.extraction import extract_tokens
from larp.data.string_columns import pack_strings, unpack_strings
from larp.data.token_cache import INDEX, MappedCache, TokenCache, TokenCacheError, batch_rows
from larp.data.token_files import map_shard
from larp.data.video import write_video
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig

import numpy as np
import pytest
import torch

N, VIDEOS, WINDOWS = 5, 40, 2


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache of made-up codes in three shards; opening it maps it."""
    generator = torch.Generator().manual_seed(0)
    key = {"num_tokens": N, "codebook_size": 64, "tokenizer": "t", "frames": 4, "condition_frames": 1}
    tokens.begin_cache(tmp_path, key)
    for shard, numbers in enumerate((range(15), range(15, 30), range(30, VIDEOS))):
        videos = torch.tensor([number for number in numbers if number != 7 for _ in range(WINDOWS)])
        columns = {
            "codes": torch.randint(64, (len(videos), N), generator=generator, dtype=torch.int16),
            "conditions": torch.randint(64, (len(videos), N), generator=generator, dtype=torch.int16),
            "labels": videos % 3,
            "videos": videos,
            "starts": torch.arange(len(videos)) % WINDOWS,
            "flipped": torch.arange(len(videos)) % WINDOWS == 1,
            "fps": torch.full((len(videos),), 8.0, dtype=torch.float64),
        }
        described = [
            [number, f"v{number}", None if number % 5 == 0 else f"a caf\u00e9 {number}"]
            for number in numbers
            if number != 7
        ]
        tokens.write_shard(
            tokens.shard_path(tmp_path, shard), columns, described, [["v7", "broken"]] if not shard else []
        )
    tokens.finish_cache(tmp_path, key, ("x", "y", "z"), "runs/tok", 3)
    return tmp_path


def both(folder, monkeypatch) -> tuple[TokenCache, MappedCache]:
    memory = TokenCache.open(folder)
    monkeypatch.setattr(tokens, "MAPPED_FROM", 1)
    mapped = TokenCache.open(folder)
    assert isinstance(mapped, MappedCache) and not isinstance(memory, MappedCache)
    return memory, mapped


def assert_equal(mapped: TokenCache, memory: TokenCache) -> None:
    assert len(mapped) == len(memory) and mapped.key == memory.key and mapped.classes == memory.classes
    for column in tokens.COLUMNS:
        one, other = getattr(mapped, column), getattr(memory, column)
        assert torch.equal(one, other) and one.dtype == other.dtype, column
    assert mapped.names == memory.names and mapped.captions == memory.captions
    assert tuple(mapped.names) == memory.names and mapped.captions[3:9:2] == memory.captions[3:9:2]
    assert mapped.names[-1] == memory.names[-1] and mapped.skipped == memory.skipped
    for task in ("class", "frame-prediction"):
        mapped.require(task, "here")
        rows = batch_rows(len(memory), 3, 7, seed=1)
        for one, other in zip(mapped.batch(rows, task), memory.batch(rows, task), strict=True):
            assert torch.equal(one, other)
    assert mapped.frame_rate(1) == memory.frame_rate(1)


def test_a_mapped_cache_equals_one_in_memory(folder, monkeypatch):
    memory, mapped = both(folder, monkeypatch)
    assert_equal(mapped, memory)
    for one, other in zip(mapped.hold_out(5), memory.hold_out(5), strict=True):
        assert isinstance(one, MappedCache)
        assert_equal(one, other)
    some = torch.tensor([3, 30, 31, 77])
    assert_equal(mapped.select(some).select(torch.tensor([1, 3])), memory.select(some[[1, 3]]))
    other = replace(memory, classes=("z", "q", "x"), labels=torch.where(memory.labels == 1, -1, memory.labels))
    joined = memory.joined(other)
    for one in (mapped.joined(other), memory.hold_out(5)[0].joined(mapped)):
        assert isinstance(one, MappedCache)
    for column in tokens.COLUMNS:
        assert torch.equal(getattr(mapped.joined(other), column), getattr(joined, column))
    assert mapped.joined(other).names == joined.names and mapped.joined(other).classes == ("x", "y", "z", "q")
    with pytest.raises(TokenCacheError, match="clips have no class"):
        mapped.joined(other).require("class", "here")


def test_opening_maps_nothing_and_a_batch_maps_its_shards_alone(folder, monkeypatch):
    monkeypatch.setattr(tokens, "MAPPED_FROM", 1)
    from larp.data import token_rows

    mapped = []
    monkeypatch.setattr(token_rows, "map_shard", lambda path: mapped.append(path.name) or map_shard(path))
    cache = TokenCache.open(folder)
    assert len(cache) == (VIDEOS - 1) * WINDOWS and mapped == []
    cache.batch(torch.tensor([0, 5]), "class")
    assert mapped == ["shard-00000.safetensors"]
    cache.batch(torch.tensor([40, 1]), "class")
    assert mapped[1:] == ["shard-00001.safetensors"]


def test_a_damaged_shard_is_named_when_the_cache_is_opened(folder, monkeypatch):
    monkeypatch.setattr(tokens, "MAPPED_FROM", 1)
    shard = folder / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(TokenCacheError, match=r"shard-00001.*missing or damaged.*run the extraction again"):
        TokenCache.open(folder)
    index = json.loads((folder / INDEX).read_text())
    for name in ("rows", "bytes"):
        del index[name]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(TokenCacheError, match=r"shard-00001.*delete this file"):
        TokenCache.open(folder)  # of an earlier version: read whole


def test_strings_with_none_and_names_that_are_no_unicode():
    strings = ["", None, "caf\u00e9", "\udcff.mp4", "a" * 300, "\u2028"]
    data, ends = pack_strings(strings)
    order = torch.tensor([5, 0, 1, 3, 2, 4, 1])
    assert unpack_strings(data, ends, order) == [strings[row] for row in order]
    assert unpack_strings(*pack_strings([]), torch.empty(0, dtype=torch.int64)) == []


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("width", 16), ("depth", 1), ("heads", 2))
    }
    shape = dict(num_frames=4, height=16, width=16, patch_size=(2, 8, 8), num_tokens=N, codebook_size=64, code_dim=8)
    return LarpTokenizer(TokenizerConfig(**shape, **sides, prior=PriorConfig(enabled=False))).eval()


def test_machines_share_an_extraction_of_shards_and_one_that_died_is_repeated_alone(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("LARP_DATA", str(tmp_path / "home"))
    random = np.random.default_rng(0)
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard:05d}.tar", "w") as tar:
            for k in range(6):
                write_video(tmp_path / "v.mp4", random.integers(0, 255, (5, 16, 16, 3), dtype=np.uint8), fps=8)
                movie = (tmp_path / "v.mp4").read_bytes() if (shard, k) != (1, 2) else b"no video"
                for name, data in (
                    (f"{shard}{k}.mp4", movie),
                    (f"{shard}{k}.txt", b"text"),
                    (f"{shard}{k}.cls", b"%d" % shard),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    videos = open_videos(f"wds:{tmp_path}/*.tar", "all")
    whole = extract_tokens(tokenizer, videos, "all", tmp_path / "whole")
    assert (
        len(whole) == 17
        and [name for name, _ in whole.skipped] == ["00001.tar/12.mp4"]
        and set(whole.captions) == {"text"}
    )
    assert len(list((tmp_path / "whole").glob("shard-*"))) == 3 and whole.classes == ("0", "1", "2")
    folder = tmp_path / "shared"
    assert extract_tokens(tokenizer, videos, "all", folder, share=(1, 2)) is None
    assert sorted(path.name for path in folder.glob("shard-*")) == [
        "shard-00000.safetensors",
        "shard-00002.safetensors",
    ]
    (folder / "shard-00002.safetensors").unlink()  # the first machine died before it
    assert extract_tokens(tokenizer, videos, "all", folder, share=(2, 2)) is None
    before = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    another_rank = dict(share=(1, 2), agree=lambda everything: everything and False)  # has not seen the last shard
    assert extract_tokens(tokenizer, videos, "all", folder, **another_rank) is None
    again = extract_tokens(tokenizer, videos, "all", folder, share=(1, 2))
    assert (
        torch.equal(again.codes, whole.codes)
        and again.names == whole.names
        and again.labels.tolist() == whole.labels.tolist()
    )
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == before, "what was done is kept"
    (tmp_path / "00002.tar").touch()
    with pytest.raises(TokenCacheError, match="videos is '18 videos"):
        extract_tokens(tokenizer, open_videos(f"wds:{tmp_path}/*.tar", "all"), "all", folder)
