"""Frechet distance: golden value, merging, files, and behaviour on known Gaussians."""

from larp.metrics.frechet import Moments, bootstrap_deviation, frechet_distance, real_floor

import pytest
import torch
from safetensors.torch import load_file


def features(n: int, dim: int = 6, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) + shift


def test_golden_value(golden_root):
    golden = load_file(golden_root / "frechet" / "expected.safetensors")
    value = frechet_distance(Moments.of(golden["features_a"]), Moments.of(golden["features_b"]))
    assert value == pytest.approx(float(golden["frechet"]), rel=1e-6)


def test_moments_do_not_depend_on_sharding():
    whole = features(101)
    merged = Moments.empty(6)
    for shard in (whole[70:], whole[:3], whole[3:70]):
        merged = merged + Moments.of(shard)
    direct = Moments.of(whole)
    assert merged.count == 101
    torch.testing.assert_close(merged.covariance, direct.covariance, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Moments.of(whole[:50]).update(whole[50:]).mean, direct.mean, rtol=1e-12, atol=1e-12)


def test_covariance_divides_by_n():
    points = torch.tensor([[0.0], [2.0]])
    assert float(Moments.of(points).covariance) == pytest.approx(1.0)


def test_known_distances():
    a = Moments.of(features(400))
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    shifted = Moments.of(features(400, shift=2.0))
    assert frechet_distance(a, shifted) == pytest.approx(6 * 4.0, rel=1e-5)
    doubled = Moments.of((features(400) - a.mean) * 2 + a.mean)
    assert frechet_distance(a, doubled) == pytest.approx(float(a.covariance.trace()), rel=1e-5)


def test_fewer_clips_than_dimensions_stays_finite_and_symmetric():
    a, b = Moments.of(features(5, dim=40)), Moments.of(features(7, dim=40, seed=1))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert frechet_distance(a, b) > 0


def test_file_round_trip_and_wrong_file(tmp_path):
    path = tmp_path / "moments.safetensors"
    moments = Moments.of(features(9))
    moments.save(path)
    loaded = Moments.load(path)
    assert loaded.count == 9 and torch.equal(loaded.sum, moments.sum) and torch.equal(loaded.outer, moments.outer)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"moments.safetensors"):
        Moments.load(path)


def test_errors():
    with pytest.raises(ValueError, match=r"\(n, D\)"):
        Moments.of(torch.zeros(3))
    with pytest.raises(ValueError, match="1 of 2 features are not finite"):
        Moments.of(torch.tensor([[1.0], [float("nan")]]))
    with pytest.raises(ValueError, match="3 and 4"):
        Moments.empty(3).merge(Moments.empty(4))
    with pytest.raises(ValueError, match="no clip"):
        frechet_distance(Moments.empty(3), Moments.empty(3))


def test_the_floor_uses_disjoint_samples_and_reports_their_size():
    real = features(100)
    value, size = real_floor(real, 20, seed=0)
    assert size == 20 and value > 0
    assert real_floor(real, 80, seed=0)[1] == 50
    assert real_floor(real, 20, seed=0)[0] == value != real_floor(real, 20, seed=1)[0]


def test_the_bootstrap_deviation_shrinks_with_more_clips_and_pairs_rows():
    few = bootstrap_deviation(features(20), features(20, seed=1), repeats=20, seed=0)
    many = bootstrap_deviation(features(2000), features(2000, seed=1), repeats=20, seed=0)
    assert many < few
    assert bootstrap_deviation(features(20), features(20), repeats=4, seed=0, paired=True) == pytest.approx(0, abs=1e-9)
