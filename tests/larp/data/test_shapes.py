"""The built-in videos: parsable captions, disjoint splits, reproducible pixels and atomic writing."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import combinations

from larp.data import shapes
from larp.data.shapes import Attributes
from larp.data.video import read_video

import numpy as np
import pytest

TRIPLES = [(c, s, d) for c in shapes.COLOURS for s in shapes.SHAPES for d in shapes.DIRECTIONS]


def test_held_out_triples_are_balanced_and_every_pair_of_values_stays_in_train():
    held = [triple for triple in TRIPLES if shapes.held_out(triple)]
    assert len(TRIPLES) == 72 and len(held) == 16 and shapes.held_out(("red", "circle", "left"))
    for axis, low, high in ((0, 2, 3), (1, 5, 6), (2, 4, 4)):
        counts = Counter(triple[axis] for triple in held)
        assert low <= min(counts.values()) and max(counts.values()) <= high
        assert len(counts) == len({triple[axis] for triple in TRIPLES})
    for a, b in combinations(range(3), 2):
        kept = {(t[a], t[b]) for t in TRIPLES if not shapes.held_out(t)}
        assert kept == {(t[a], t[b]) for t in TRIPLES}


def test_splits_never_share_a_triple():
    train = {attributes.triple for attributes, _ in shapes.sample_attributes(300, 0, "train")}
    test = {attributes.triple for attributes, _ in shapes.sample_attributes(300, 0, "test")}
    assert len(train) == 56 and len(test) == 16 and not train & test


def test_captions_of_every_phrasing_are_parsed():
    for triple in TRIPLES:
        for speed in (None, *shapes.SPEEDS):
            for phrase in range(len(shapes.PHRASES)):
                attributes = Attributes(*triple, speed)
                assert shapes.parse_caption(shapes.caption(attributes, phrase, say_speed=True)) == attributes
    assert shapes.caption(Attributes("red", "circle", "left", "quickly")) == "a red circle moving left"
    texts = [text for _, text in shapes.sample_attributes(400, 0, "train")]
    assert 120 < sum(text.endswith("ly") for text in texts) < 280 and len({text.split()[0] for text in texts}) > 1


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("a circle moving left", "colour"),
        ("a red blue circle moving left", "colour"),
        ("a red dog moving left", "shape"),
        ("a red circle", "direction"),
    ],
)
def test_incomplete_captions_are_refused(text, missing):
    with pytest.raises(ValueError, match=rf"must name one {missing}"):
        shapes.parse_caption(text)


def test_prompts_are_held_out_and_start_with_the_red_circle():
    prompts = shapes.held_out_prompts()
    assert len(prompts) == 64 == len(set(prompts)) and prompts[0] == "a red circle moving left"
    assert Counter(shapes.parse_caption(p).triple for p in prompts).values() and all(
        shapes.held_out(shapes.parse_caption(p).triple) for p in prompts
    )
    assert {shapes.parse_caption(p).triple for p in prompts[:16]} == shapes.HELD_OUT
    assert len(shapes.held_out_prompts(200)) == 200


@pytest.mark.parametrize("size", [16, 32, 64])
def test_rendered_paths_stay_inside_and_follow_the_attributes(size):
    for k, triple in enumerate(TRIPLES):
        attributes = Attributes(*triple, ("slowly", "quickly")[k % 2])
        video = shapes.render(attributes, seed=k, size=size, frames=8).astype(int)
        saturation = video.max(axis=-1) - video.min(axis=-1)
        whole = saturation.sum(axis=(1, 2))
        assert np.ptp(whole) < 0.04 * whole.mean(), attributes  # nothing is cut off by the frame
        colour = saturation > 20
        y, x = (
            np.array([place.mean() for place in axis]) for axis in zip(*(np.nonzero(c) for c in colour), strict=True)
        )
        step = np.array([x[-1] - x[0], y[-1] - y[0]])
        along = step @ shapes.DIRECTIONS[attributes.direction]
        assert along == pytest.approx(size * shapes.SPEEDS[attributes.speed], rel=0.15), attributes
        assert np.abs(step).min() < 1


def test_the_same_seed_gives_the_same_pixels():
    """If this hash changes, VERSION must change too, or caches would mix."""
    attributes = Attributes("cyan", "triangle", "up", "quickly")
    video = shapes.render(attributes, seed=5)
    assert np.array_equal(video, shapes.render(attributes, seed=5))
    assert not np.array_equal(video, shapes.render(attributes, seed=6))
    assert sha256(video.tobytes()).hexdigest()[:16] == "0ca376c69942ab8c"


def test_files_hold_what_was_rendered(tmp_path, monkeypatch):
    monkeypatch.setenv("LARP_DATA", str(tmp_path))
    folder = shapes.materialise("test", count=16, seed=3)
    assert folder.is_relative_to(tmp_path) and len(list(folder.glob("*.mp4"))) == 16
    attributes, _ = shapes.sample_attributes(16, 3, "test")[2]
    video, fps = read_video(folder / "000002.mp4")
    expected = shapes.render(attributes, shapes.video_seed(3, "test", 2))
    assert fps == shapes.FPS and np.abs(video.astype(int) - expected).max() < 16


def test_a_second_call_renders_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LARP_DATA", str(tmp_path))
    first = shapes.materialise("train", count=3)
    monkeypatch.setattr(shapes, "_write_split", lambda *_: pytest.fail("rendered again"))
    assert shapes.materialise("train", count=3) == first


def test_a_killed_rendering_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LARP_DATA", str(tmp_path))
    real, done = shapes.write_video, []

    def killed(*args, **options):
        done.append(real(*args, **options))
        if len(done) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "write_video", killed)
    with pytest.raises(KeyboardInterrupt):
        shapes.materialise("train", count=5)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    monkeypatch.setattr(shapes, "write_video", real)
    assert len(list(shapes.materialise("train", count=5).glob("*.mp4"))) == 5


def test_concurrent_processes_share_one_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LARP_DATA", str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: shapes.materialise("train", count=4), range(4)))
    assert len(folders) == 1
    parent = folders.pop().parent
    assert [path.name for path in parent.iterdir()] == ["train"] and len(list((parent / "train").glob("*.mp4"))) == 4


def test_sizes_too_small_to_render_are_refused():
    with pytest.raises(ValueError, match=r"size=8 is too small; the least is 16"):
        shapes.materialise("train", size=8)
