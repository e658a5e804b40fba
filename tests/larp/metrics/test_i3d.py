"""Random I3D; how the published weights are found, verified and called; the I3D of the original FVD against its own values."""

import os
from dataclasses import replace
from pathlib import Path

from larp.data.clips import frames_to_clip
from larp.data.video import read_video
from larp.metrics.frechet import Moments, frechet_distance
from larp.metrics.i3d import I3D, PublishedI3D, RandomI3D, TfHubI3D, open_features
from larp.metrics.i3d_kinetics import KineticsI3D, MaxPool, pad_same, resize
from larp.metrics.protocols import PRESETS
from larp.metrics.weights import I3D_STYLEGANV, WeightsMissing, file_sha256

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture(scope="module")
def tiny():
    return RandomI3D(width=0.125)


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    monkeypatch.delenv(I3D_STYLEGANV.variable, raising=False)
    monkeypatch.setenv("LARP_CACHE", str(tmp_path / "empty"))


class FakeI3D(torch.nn.Module):
    """Imitates the published file; its features encode its arguments."""

    def forward(self, x: torch.Tensor, rescale: bool = True, resize: bool = False, return_features: bool = False):
        features = torch.zeros(x.shape[0], 400)
        features[:, 0] = x.amin(dim=(1, 2, 3, 4))
        features[:, 1] = x.amax(dim=(1, 2, 3, 4))
        features[:, 2] = float(rescale) * 4 + float(resize) * 2 + float(return_features)
        return features


@pytest.fixture
def fake_file(tmp_path):
    path = tmp_path / "i3d_torchscript.pt"
    torch.jit.script(FakeI3D()).save(str(path))
    return path


def clips(seed, batch=12, frames=8, size=32):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 2, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(frames, size, size), mode="trilinear")


def test_random_features_are_deterministic_and_differ_between_clips(tiny):
    a = tiny(clips(0))
    assert a.shape == (12, 400) and a.dtype == torch.float32 and torch.isfinite(a).all()
    torch.testing.assert_close(a, RandomI3D(width=0.125)(clips(0)))
    torch.testing.assert_close(a[:3], tiny(clips(0)[:3]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(a, RandomI3D(seed=1, width=0.125)(clips(0)))
    # Neither vanishing nor one value for all: the spread between clips is of the order of the features themselves.
    assert 0.1 < float(a.std(dim=0).mean()) < 10
    assert float(torch.pdist(a).min()) > 0.1


def test_random_features_depend_on_motion(tiny):
    still = clips(1)[:, :, :1].expand(-1, -1, 8, -1, -1)
    moving = torch.stack([still[:, :, t].roll(3 * t, dims=-1) for t in range(8)], dim=2)
    assert float((tiny(still) - tiny(moving)).norm(dim=1).min()) > 0.1


def test_distance_grows_with_damage(tiny):
    real, other = tiny(clips(2, batch=24)), tiny(clips(3, batch=24))
    noise = torch.rand(24, 3, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    lightly, heavily = (clips(3, batch=24) * (1 - share) + noise * share for share in (0.2, 0.6))
    floor, little, much = (
        frechet_distance(Moments.of(real), Moments.of(features)) for features in (other, tiny(lightly), tiny(heavily))
    )
    assert floor < little < much


def test_random_i3d_is_never_called_fvd(tiny):
    assert tiny.name == "frechet-random-i3d" and "random" in tiny.weights_hash


def test_full_network_has_the_published_widths():
    model = I3D()
    norms = sum(layer.num_features for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm3d))
    # The published RGB network has 12,697,264 parameters; ours leaves out the affine
    # parts of the batch norms and the bias of the logits.
    assert sum(parameter.numel() for parameter in model.parameters()) == 12_697_264 - 2 * norms - 400


@pytest.mark.parametrize("shape", [(1, 3, 1, 16, 16), (1, 3, 4, 16, 24), (1, 3, 16, 8, 8)])
def test_takes_short_and_small_clips(tiny, shape):
    assert torch.isfinite(tiny(torch.rand(shape, generator=torch.Generator().manual_seed(0)))).all()


def test_clip_shape_and_range_are_checked(tiny):
    with pytest.raises(ValueError, match=r"\(B, 3, T, H, W\)"):
        tiny(torch.zeros(1, 8, 3, 16, 16))
    with pytest.raises(ValueError, match="clamp"):
        tiny(torch.full((1, 3, 4, 16, 16), 1.01))
    with pytest.raises(ValueError, match="clamp"):
        tiny(torch.full((1, 3, 4, 16, 16), float("nan")))


def test_published_file_is_called_with_minus_one_to_one(fake_file):
    source = replace(I3D_STYLEGANV, sha256=file_sha256(fake_file))
    features = PublishedI3D(fake_file, source=source)
    clip = torch.zeros(2, 3, 10, 8, 8)
    clip[:, :, 5:] = 1.0
    assert features(clip)[:, :3].tolist() == [[-1.0, 1.0, 3.0]] * 2
    assert (features.name, features.weights_hash) == ("fvd-i3d-styleganv", source.sha256)
    with pytest.raises(ValueError, match="at least 10 frames, got 9"):
        features(torch.zeros(1, 3, 9, 8, 8))


def test_another_file_is_refused_before_it_is_loaded(fake_file):
    with pytest.raises(ValueError, match=r"not the published i3d_torchscript.pt: SHA-256"):
        PublishedI3D(fake_file)


def test_a_missing_file_and_its_places_are_named(no_weights, monkeypatch, tmp_path):
    with pytest.raises(WeightsMissing) as error:
        open_features("fvd-i3d-styleganv")
    assert "i3d_torchscript.pt" in str(error.value) and str(tmp_path / "empty") in str(error.value)
    assert open_features("auto").name == "frechet-random-i3d"
    with pytest.raises(WeightsMissing, match=r"gone.pt, which does not exist"):
        open_features("auto", path=tmp_path / "gone.pt")
    monkeypatch.setenv("LARP_I3D", str(tmp_path / "lost.pt"))
    with pytest.raises(WeightsMissing, match="LARP_I3D names"):
        open_features("auto")


def test_contradictory_or_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="drop one"):
        open_features("frechet-random-i3d", path=tmp_path)
    with pytest.raises(ValueError, match="unknown features 'fvd'"):
        open_features("fvd")


# Between all-zero and all-one clips: the original in TensorFlow for 30 frames, and for the others the same network checked against it.
TFHUB_DISTANCES = {10: 569.77, 12: 552.77, 16: 152.90, 24: 66.29, 30: 151.39236}


@pytest.fixture(scope="module")
def tfhub_features():
    cached = Path(os.environ.get("LARP_CACHE") or Path.home() / ".cache" / "larp") / "i3d-kinetics-400.safetensors"
    if not cached.is_file():
        pytest.skip("needs published weights: larp-mllm fetch i3d")
    return TfHubI3D(cached)


@pytest.mark.parametrize(
    "frames", [10, *(pytest.param(count, marks=pytest.mark.slow) for count in TFHUB_DISTANCES if count > 10)]
)
def test_distances_of_constant_clips_are_those_of_the_original(tfhub_features, frames):
    zeros, ones = (tfhub_features(torch.full((1, 3, frames, 64, 64), value)) for value in (0.0, 1.0))
    # The Frechet distance of two points.
    assert float((zeros - ones).double().square().sum()) == pytest.approx(TFHUB_DISTANCES[frames], rel=1e-4)


def test_its_figures_are_called_fvd_but_not_compared_with_the_torchscript(tfhub_features):
    protocol = replace(PRESETS["larp-ucf101-gfvd"], features=tfhub_features.name)
    assert protocol.metric == "gFVD" and any("features" in reason for reason in protocol.deviations)
    with pytest.raises(ValueError, match="at least 10 frames"):
        tfhub_features(torch.zeros(1, 3, 9, 64, 64))


@pytest.mark.slow
def test_real_clips_get_the_class_names_of_kinetics(tfhub_features, clips_root):
    """Among six action names, most of the UCF-101 clips get their own; HorseRace is no class of Kinetics, riding a horse is."""
    classes = {
        "Archery": 5,
        "BasketballDunk": 107,
        "PlayingPiano": 241,
        "PlayingViolin": 250,
        "HorseRace": 273,
        "Surfing": 337,
    }
    hits = []
    for number, name in enumerate(classes):
        for path in sorted((clips_root / "ucf101/UCF-101" / name).glob("*_g08_*"))[:2]:
            frames, _ = read_video(path)
            middle = len(frames) // 2
            clip = frames_to_clip(frames[middle - 8 : middle + 8], 128, 128)
            hits.append(int(tfhub_features(clip[None])[0, list(classes.values())].argmax()) == number)
    assert len(hits) == 12 and sum(hits) >= 10


def test_an_odd_pad_has_its_extra_cell_at_the_end():
    x = torch.ones(1, 1, 8, 8, 7)
    assert pad_same(x, (7, 7, 7), (2, 2, 2)).shape[2:] == (13, 13, 13)
    padded = pad_same(x, (2, 2, 2), (2, 2, 2))
    assert padded.shape[2:] == (8, 8, 8) and padded[0, 0, 0, 0].tolist() == [1.0] * 7 + [0.0]


@pytest.mark.parametrize("size", [(2, 7, 7), (4, 8, 9), (8, 14, 13)])
@pytest.mark.parametrize(
    ("kernel", "stride"),
    [((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (1, 1, 1)), ((3, 3, 3), (2, 2, 2)), ((2, 2, 2), (2, 2, 2))],
)
def test_pools_are_those_of_torch_to_the_bit(size, kernel, stride):
    x = torch.randn(2, 5, *size, generator=torch.Generator().manual_seed(0))
    expected = F.max_pool3d(pad_same(x, kernel, stride, float("-inf")), kernel, stride)
    assert torch.equal(MaxPool(kernel, stride)(x), expected)


def test_the_network_of_the_original_has_its_shapes():
    model = KineticsI3D()
    # 12,697,264 with the affine part of the batch norms, of which the folded ones have the shift alone.
    assert (
        sum(p.numel() for p in model.parameters())
        == 12_697_264
        - sum(layer.out_channels for layer in model.modules() if isinstance(layer, torch.nn.Conv3d))
        + model.logits.out_channels
    )
    assert resize(torch.rand(2, 3, 4, 20, 30)).shape == (2, 3, 4, 224, 224)
