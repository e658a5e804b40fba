"""Features that are computed once for a clip, whoever asks, and files that cannot be used."""

import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor

from larp.metrics.i3d import RandomI3D
from larp.metrics.kept_features import FILE, KeptFeatures

import pytest
import torch


class Counted(RandomI3D):
    """Counts the clips that it computes."""

    def __init__(self, weights: str = "some") -> None:
        super().__init__(width=0.05)
        self.clips, self.weights_hash = 0, weights

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        self.clips += len(clip)
        return super().__call__(clip)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LARP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


CLIPS = torch.rand(5, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_clip_is_computed_once_in_any_batch_and_program(cache):
    first = Counted()
    expected = KeptFeatures(first)(CLIPS[:3])
    assert first.clips == 3 and torch.equal(expected, RandomI3D(width=0.05)(CLIPS[:3]))
    # Another program, another order, two new clips.
    second = Counted()
    found = KeptFeatures(second)(CLIPS[[4, 2, 0, 1, 3]])
    assert second.clips == 2 and torch.equal(found[[2, 3, 1]], expected)
    assert (cache / FILE).stat().st_size < 100_000
    # Bits that differ are another clip; a mirror image too.
    KeptFeatures(second)(CLIPS[:1] * 0.999)
    KeptFeatures(second)(CLIPS[:1].flip(-1))
    assert second.clips == 4


def test_other_weights_shapes_and_names_have_features_of_their_own(cache):
    KeptFeatures(Counted())(CLIPS)
    other = Counted("others")
    KeptFeatures(other)(CLIPS)
    shaped = Counted()
    KeptFeatures(shaped)(CLIPS.reshape(5, 3, 4, 8, 32))
    assert other.clips == 5 and shaped.clips == 5


def test_an_empty_batch_and_what_the_extractor_refuses(cache):
    kept = KeptFeatures(RandomI3D(width=0.05))
    with pytest.raises(ValueError, match="values lie in"):
        kept(CLIPS + 1)
    assert kept.name == "frechet-random-i3d" and kept.dim == 400 and kept.min_frames == 1


def test_threads_share_the_file(cache):
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda k: KeptFeatures(Counted())(CLIPS[k % 5 : k % 5 + 1]), range(40)))
    last = Counted()
    assert torch.equal(KeptFeatures(last)(CLIPS), torch.cat(parts[:5])) and last.clips == 0


def test_a_damaged_file_costs_the_time_and_nothing_else(cache):
    cache.mkdir()
    (cache / FILE).write_bytes(b"no data base, but long enough to look like one" * 100)
    features = Counted()
    kept = KeptFeatures(features)
    with pytest.warns(UserWarning, match="features of clips are not kept, .*features.sqlite cannot be used"):
        found = kept(CLIPS)
    assert torch.equal(found, kept(CLIPS)) and features.clips == 10


def test_a_row_that_is_cut_short_is_computed_again(cache):
    features = Counted()
    expected = KeptFeatures(features)(CLIPS)
    for clips, damage in ((10, "x'00000000'"), (15, "x'0000'"), (20, "'text'"), (25, "null")):
        with sqlite3.connect(cache / FILE) as store:
            store.execute(f"update features set value = {damage}")
        for _ in range(2):
            assert torch.equal(KeptFeatures(features)(CLIPS), expected) and features.clips == clips


def test_what_can_be_read_and_not_written_is_read(cache):
    expected = KeptFeatures(Counted())(CLIPS[:3])
    with sqlite3.connect(cache / FILE) as store:
        store.execute("create trigger full before insert on features begin select raise(abort, 'disk is full'); end")
    features = Counted()
    kept = KeptFeatures(features)
    with pytest.warns(UserWarning, match="are not kept, .* disk is full"):
        kept(CLIPS[3:])
    assert torch.equal(kept(CLIPS[:3]), expected) and features.clips == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write everywhere")
def test_a_folder_that_takes_no_files(cache):
    cache.mkdir(mode=0o500)
    with pytest.warns(UserWarning, match="are not kept"):
        assert KeptFeatures(Counted())(CLIPS).shape == (5, 400)


def test_a_cache_folder_that_is_a_file(cache):
    cache.write_text("")
    with pytest.warns(UserWarning, match="are not kept"):
        assert KeptFeatures(Counted())(CLIPS).shape == (5, 400)
