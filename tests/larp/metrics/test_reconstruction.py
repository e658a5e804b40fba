"""Reconstruction metrics, with and without published weights."""

from larp.metrics.frechet import Moments, frechet_distance
from larp.metrics.i3d import RandomI3D
from larp.metrics.lpips import Lpips
from larp.metrics.psnr_ssim import ssim
from larp.metrics.reconstruction import ValidationMetrics, reconstruct
from larp.metrics.weights import I3D_STYLEGANV, LPIPS_HEADS, VGG16, WeightFile, file_sha256
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig

import pytest
import torch

SHAPE = (10, 16, 16)


class FakeI3D(torch.nn.Module):
    """Imitates the published file; its features are the mean colour of each frame."""

    def forward(self, x: torch.Tensor, rescale: bool = True, resize: bool = False, return_features: bool = False):
        return torch.nn.functional.pad(x.mean(dim=(3, 4)).flatten(1), (0, 370))


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    sides = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("width", 32), ("depth", 1), ("heads", 2))
    }
    settings = dict(
        num_frames=10, height=16, width=16, patch_size=(5, 8, 8), num_tokens=4, codebook_size=16, code_dim=4
    )
    model = LarpTokenizer(TokenizerConfig(**settings, **sides, prior=PriorConfig(enabled=False)))
    torch.nn.init.normal_(model.head.weight, std=0.05)
    return model


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    for source in (I3D_STYLEGANV, VGG16, LPIPS_HEADS):
        monkeypatch.delenv(source.variable, raising=False)
    monkeypatch.setenv("LARP_CACHE", str(tmp_path / "empty"))


@pytest.fixture
def fake_weights(no_weights, monkeypatch, tmp_path):
    """Files with random weights that pass for the published ones."""
    torch.manual_seed(1)
    state = Lpips().state_dict()
    torch.save({key: value for key, value in state.items() if key.startswith("features")}, tmp_path / "vgg.pth")
    torch.save(
        {f"lin{i}.model.1.weight": torch.rand_like(state[f"heads.{i}"]) for i in range(5)}, tmp_path / "heads.pth"
    )
    torch.jit.script(FakeI3D()).save(str(tmp_path / "i3d.pt"))
    for source, name in ((VGG16, "vgg.pth"), (LPIPS_HEADS, "heads.pth"), (I3D_STYLEGANV, "i3d.pt")):
        monkeypatch.setenv(source.variable, str(tmp_path / name))
    monkeypatch.setattr(WeightFile, "verify", lambda self, path: file_sha256(path))


def batches(count=3, size=2):
    generator = torch.Generator().manual_seed(0)
    return [{"clip": torch.rand(size, 3, *SHAPE, generator=generator)} for _ in range(count)]


def test_validation_measures_lpips_and_rfvd_if_their_weights_exist(tokenizer, fake_weights):
    validation = ValidationMetrics.with_available_weights(SHAPE)
    assert validation.notes == []
    metrics = reconstruct(tokenizer, batches(), metrics=validation).metrics
    clips = torch.cat([batch["clip"] for batch in batches()])
    with torch.no_grad():
        decoded = tokenizer.eval()(clips).reconstruction.clamp(0, 1)
    assert metrics["lpips"] == pytest.approx(Lpips.load()(clips, decoded).mean().item(), rel=1e-5)
    colours = [
        torch.nn.functional.pad((side * 2 - 1).mean(dim=(3, 4)).flatten(1), (0, 370)) for side in (clips, decoded)
    ]
    assert metrics["rfvd"] == pytest.approx(frechet_distance(*map(Moments.of, colours)), rel=1e-4)
    assert 0 < metrics["rfvd_floor"] < metrics["rfvd"] and metrics["num_clips"] == 6
    again = reconstruct(tokenizer, batches(), metrics=validation).metrics
    assert again == metrics, "a second pass starts anew"


def test_missing_weights_are_noted(tokenizer, no_weights):
    validation = ValidationMetrics.with_available_weights(SHAPE)
    assert [note.split(":")[0] for note in validation.notes] == ["validation without LPIPS", "validation without rFVD"]
    assert "larp-mllm fetch lpips" in validation.notes[0] and "i3d_torchscript.pt" in validation.notes[1]
    metrics = reconstruct(tokenizer, batches(), metrics=validation).metrics
    assert {"lpips", "rfvd"}.isdisjoint(metrics) and metrics == reconstruct(tokenizer, batches()).metrics


def test_clips_too_small_or_short_for_the_networks_are_noted(fake_weights):
    validation = ValidationMetrics.with_available_weights((8, 8, 32))
    assert validation.features is None and validation.perceptual is None
    assert ["16 pixels" in validation.notes[0], "10 frames" in validation.notes[1]] == [True, True]
    ready = Lpips()
    assert ValidationMetrics.with_available_weights(SHAPE, perceptual=ready).perceptual is ready, (
        "a loaded one is not loaded again"
    )


def test_random_features_and_few_clips_give_no_rfvd(tokenizer, fake_weights):
    metrics = reconstruct(tokenizer, batches(), metrics=ValidationMetrics(RandomI3D(width=0.05))).metrics
    assert "rfvd" not in metrics, "FVD is only what the published network measures"
    assert (
        "rfvd"
        not in reconstruct(tokenizer, batches(1), metrics=ValidationMetrics.with_available_weights(SHAPE)).metrics
    )


def test_figures_are_exact_under_autocast(tokenizer):
    """Convolutions in 16 bits would change the second digit of SSIM."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metrics = reconstruct(tokenizer, batches()).metrics
        with torch.no_grad():
            decoded = [tokenizer.eval()(b["clip"]).reconstruction.float().clamp(0, 1) for b in batches()]
    wanted = torch.cat([ssim(b["clip"], d) for b, d in zip(batches(), decoded, strict=True)]).mean().item()
    assert metrics["ssim"] == pytest.approx(wanted, rel=1e-5)
