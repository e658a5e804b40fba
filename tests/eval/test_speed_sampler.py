"""eval/speed_sampler.py on a tiny model: what it compares, what it refuses. Its figures are not tested: they are the machine's."""

import json

from bench.timing import Lap
from eval import speed_sampler
from eval.speed_sampler import SamplerSpeedConfig, check_agreement, figures, make_candidates, random_generator

import pytest
import torch

TINY = ["--size", "tiny", "--num-tokens", "16", "--codebook-size", "64", "--batch-size", "3", "--positions", "2"]


def test_all_candidates_are_timed_and_written_down(tmp_path, capsys):
    out = tmp_path / "sampler.json"
    record = speed_sampler.main([*TINY, "--steps", "1", "--repeats", "3", "--out", str(out)])
    assert json.loads(out.read_text()) == record
    assert record["positions"] == [4, 12] and record["weights"] in ("packed", "plain")
    assert set(record["milliseconds"]) == {"read", "one", "naive_one", "batch", "naive_batch"}
    for clock in (record, record["by_cpu_time"]):
        assert all(len(values) == 2 and min(values) > 0 for values in clock["milliseconds_at_positions"].values())
    assert capsys.readouterr().out.count("times the clips a minute") == 2


def test_ratios():
    config = SamplerSpeedConfig(num_tokens=100, batch_size=8, steps=2)
    times = {"read": [0.02], "one": [0.02, 0.04], "naive_one": [0.12], "batch": [0.08], "naive_batch": [0.4]}
    laps = {name: [[Lap(9.0, 2 * t)] * 2 + [Lap(9.0, 99.0)] for t in own] for name, own in times.items()}
    got = figures(config, laps, "cpu_seconds")
    assert got["one_over_reading"] == pytest.approx(1.5) and got["naive_over_one"] == pytest.approx(4)
    assert got["clips_per_minute"] == {"one": pytest.approx(20), "batch": pytest.approx(60)}
    assert got["batch_clips_over_one"] == pytest.approx(3) and got["naive_over_batch"] == pytest.approx(5)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_sampler_that_writes_other_codes_is_not_timed(guidance):
    config = SamplerSpeedConfig("tiny", 16, 64, guidance, 3, positions=1, steps=1, check=8, device="cpu")
    candidates = make_candidates(config, random_generator(config))
    check_agreement(config, candidates)
    candidates["one"].sampler.position_embeddings = -candidates["one"].sampler.position_embeddings
    with pytest.raises(AssertionError, match="sample different codes"):
        check_agreement(config, candidates)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"steps": 9}, "too short for 2 positions of 9 steps"),
        ({"check": 16}, "16 codes to check"),
        ({"repeats": 0}, "repeats is 0"),
        ({"guidance": 1e39}, "guidance is 1e\\+39; it must be a finite number from 0 to 1000"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": -1.0}, "guidance is -1.0"),
        ({"device": "foo"}, "device 'foo' is not there; this machine has cpu"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not there"),
    ],
)
def test_bad_options(changes, words):
    with pytest.raises(ValueError, match=words):
        SamplerSpeedConfig("tiny", 16, 64, positions=2, **changes)


def test_an_unknown_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--size huge is unknown; the sizes are tiny"):
        speed_sampler.main(["--size", "huge", "--out", str(tmp_path / "x.json")])
    assert not list(tmp_path.iterdir())
