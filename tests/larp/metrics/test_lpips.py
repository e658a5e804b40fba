"""LPIPS: key names of the published files, a distance that behaves like one, gradients, errors."""

from dataclasses import replace

from larp.metrics import lpips as module
from larp.metrics.lpips import Lpips, available
from larp.metrics.weights import LPIPS_HEADS, VGG16, WeightsMissing, file_sha256

import pytest
import torch

CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Lpips()


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    for source in (VGG16, LPIPS_HEADS):
        monkeypatch.delenv(source.variable, raising=False)
    monkeypatch.setattr("larp.metrics.weights.cache_folder", lambda: tmp_path / "empty")


def clip(seed, frames=2, size=16):
    return torch.rand(2, 3, frames, size, size, generator=torch.Generator().manual_seed(seed))


def test_distance_is_per_video_zero_for_equal_and_symmetric(model):
    a, b = clip(0), clip(1)
    assert model(a, a).tolist() == [0.0, 0.0]
    assert model(a, b).shape == (2,) and (model(a, b) > 0).all()
    torch.testing.assert_close(model(a, b), model(b, a))
    mixed = torch.cat([a[:1], b[1:]])
    assert model(a, mixed)[0] == 0 and model(a, mixed)[1] > 0


def test_distance_is_the_published_formula():
    """Written out from LPIPS 0.1 (lpips.LPIPS(net="vgg")), which gives these very numbers for the same weights."""
    torch.manual_seed(3)
    model = Lpips()
    weights = model.state_dict()
    for head in model.heads:
        head.copy_(torch.rand_like(head))
    a, b = clip(0, frames=3, size=32), clip(1, frames=3, size=32)
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    x, y = (((2 * side - 1).transpose(1, 2).flatten(0, 1) - shift) / scale for side in (a, b))
    total, heads = torch.zeros(6), iter(model.heads)
    # Two or three convolutions between poolings; each stage ends in a feature map that is compared.
    for stage in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
        if stage[0]:
            x, y = (torch.nn.functional.max_pool2d(side, 2) for side in (x, y))
        for n in stage:
            weight, bias = weights[f"features.{n}.weight"], weights[f"features.{n}.bias"]
            x, y = (torch.nn.functional.conv2d(side, weight, bias, padding=1).relu() for side in (x, y))
        unit = [side / (side.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for side in (x, y)]
        total += torch.nn.functional.conv2d((unit[0] - unit[1]).square(), next(heads)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(model(a, b), total.view(2, 3).mean(dim=1), rtol=1e-5, atol=0)


def test_differentiable_in_the_clip_with_frozen_weights(model):
    a = clip(0).requires_grad_()
    model(a, clip(1)).sum().backward()
    assert torch.isfinite(a.grad).all() and a.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.train().training


def test_gradient_is_finite_for_black_and_equal_clips(model):
    a = torch.zeros(1, 3, 1, 16, 16, requires_grad=True)
    model(a, torch.zeros(1, 3, 1, 16, 16)).sum().backward()
    assert torch.isfinite(a.grad).all()


def test_key_names_are_torchvisions(model):
    keys = {key for key in model.state_dict() if key.startswith("features")}
    assert keys == {f"features.{n}.{kind}" for n in CONVOLUTIONS for kind in ("weight", "bias")}


def test_load_reads_the_published_key_names_and_checks_hashes(model, tmp_path):
    vgg, heads = tmp_path / "vgg16.pth", tmp_path / "heads.pth"
    backbone = {key: value for key, value in model.state_dict().items() if key.startswith("features")}
    torch.save(backbone | {"classifier.0.weight": torch.zeros(2, 2)}, vgg)
    torch.save({f"lin{i}.model.1.weight": torch.rand_like(head) for i, head in enumerate(model.heads)}, heads)
    with pytest.raises(ValueError, match=r"vgg16.pth: not the published vgg16-397923af.pth"):
        Lpips.load(vgg, heads)
    sources = replace(VGG16, sha256=file_sha256(vgg)), replace(LPIPS_HEADS, sha256=file_sha256(heads))
    loaded = Lpips.load(vgg, heads, sources)
    torch.testing.assert_close(loaded.features[28].weight, model.features[28].weight)
    assert not torch.equal(loaded.heads[0], model.heads[0]) and loaded.heads[4].shape == (1, 512, 1, 1)
    assert loaded.weights_hash == f"{sources[0].sha256} {sources[1].sha256}"
    torch.save({"lin0.model.1.weight": torch.rand(1, 3, 1, 1)}, heads)
    wrong = sources[0], replace(LPIPS_HEADS, sha256=file_sha256(heads))
    with pytest.raises(ValueError, match=r"heads.pth: tensor lin0.model.1.weight"):
        Lpips.load(vgg, heads, wrong)


def test_missing_weights_name_both_files_and_places(no_weights):
    assert not available()
    with pytest.raises(WeightsMissing) as error:
        Lpips.load()
    for part in ("vgg16-397923af.pth", "lpips_vgg.pth", "LARP_VGG16", "LARP_LPIPS"):
        assert part in str(error.value)


def test_a_given_path_must_exist(no_weights, monkeypatch, tmp_path):
    with pytest.raises(WeightsMissing, match=r"nowhere.pth, which does not exist"):
        available(vgg16=tmp_path / "nowhere.pth")
    monkeypatch.setenv("LARP_LPIPS", str(tmp_path / "lost.pth"))
    monkeypatch.setenv("LARP_VGG16", __file__)
    with pytest.raises(WeightsMissing, match=r"LARP_LPIPS names .*lost.pth"):
        available()


def test_shapes_are_checked(model):
    with pytest.raises(ValueError, match="one shape"):
        model(clip(0), clip(0, frames=3))
    with pytest.raises(ValueError, match="8x8 are smaller"):
        model(clip(0, size=8), clip(0, size=8))
    assert module._TAPS == {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}
