"""Presets, comparability, sampling of windows, and the record."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

from larp.metrics.protocols import PRESETS, result, sample_windows, summary

import pytest

GFVD = PRESETS["larp-ucf101-gfvd"]
PUBLISHED = SimpleNamespace(name="fvd-i3d-styleganv", weights_hash="abc")
RANDOM = SimpleNamespace(name="frechet-random-i3d", weights_hash="random weights, seed 0")


def record(protocol, features, **extra):
    return result(protocol, 100.0, 2.0, (20.0, 5_000), features, {"tokenizer": "123"}, **extra)


def test_presets_are_the_published_ones():
    assert set(PRESETS) == {"larp-ucf101-gfvd", "larp-ucf101-rfvd", "larp-k600-fp"}
    assert (GFVD.num_clips, GFVD.frames, GFVD.height, GFVD.split, GFVD.seed) == (10_000, 16, 128, "train", 42)
    assert (PRESETS["larp-k600-fp"].num_clips, PRESETS["larp-k600-fp"].height) == (50_000, 64)
    for preset in PRESETS.values():
        assert preset.features == "fvd-i3d-styleganv" and preset.choices and not preset.deviations


def test_an_unchanged_preset_is_comparable():
    figure = record(GFVD, PUBLISHED)
    assert figure["metric"] == "gFVD" and figure["comparable"] and figure["reasons"] == []
    assert "comparable with figures of the protocol larp-ucf101-gfvd" in summary(figure)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_clips": 200}, "num_clips: 200 instead of 10000"),
        ({"split": "test"}, "split: test instead of train"),
        ({"frames": 8}, "frames: 8 instead of 16"),
        ({"width": 64}, "width: 64 instead of 128"),
        ({"num_videos": 529}, "num_videos: 529 instead of 9537"),
        ({"seed": 0}, "seed: 0 instead of 42"),
    ],
)
def test_every_change_is_named_and_makes_the_figure_incomparable(change, reason):
    figure = record(replace(GFVD, **change), PUBLISHED)
    assert not figure["comparable"] and figure["reasons"] == [reason]
    assert "NOT comparable" in summary(figure) and reason in summary(figure)


def test_random_features_are_never_called_fvd():
    figure = record(replace(GFVD, features="frechet-random-i3d"), RANDOM)
    assert figure["metric"] == "frechet-random-i3d" and not figure["comparable"]
    assert "fvd" not in summary(figure).lower().split("\n")[0]
    with pytest.raises(ValueError, match="measured with frechet-random-i3d"):
        record(GFVD, RANDOM)


def test_the_record_holds_everything_that_the_figure_depends_on():
    figure = json.loads(json.dumps(record(GFVD, PUBLISHED, guidance_scale=1.25)))
    assert figure["value"] == 100.0 and figure["interval_95"] == [pytest.approx(96.08), pytest.approx(103.92)]
    assert figure["floor"] == {"value": 20.0, "num_clips": 5000, "at_num_clips": 10.0}
    assert figure["checkpoints"] == {"tokenizer": "123"} and figure["guidance_scale"] == 1.25
    assert set(figure["versions"]) == {"larp", "torch", "python"} and figure["seed"] == 42
    assert figure["protocol"]["frame_rule"] and figure["features_weights"] == "abc"


def test_windows_follow_the_published_rule():
    counts = [35, 15, 48]
    every = [(0, 0), (0, 16), (2, 0), (2, 16), (2, 32)]
    sampled, spare = sample_windows(counts, 16, 3, seed=42, spare=10)
    assert sampled == random.Random(42).sample(every, 3)
    assert sorted(sampled + spare) == every
    assert sample_windows(counts, 16, 3, seed=42)[1] == []
    assert sample_windows(counts, 16, 5, seed=1)[0] != sample_windows(counts, 16, 5, seed=2)[0]


def test_too_few_windows_is_an_error_not_a_repetition():
    with pytest.raises(ValueError, match=r"num_clips=6.*3 videos hold 5 windows"):
        sample_windows([35, 15, 48], 16, 6, seed=42)
    with pytest.raises(ValueError, match="num_clips=0"):
        sample_windows([35], 16, 0, seed=42)
