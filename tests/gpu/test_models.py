"""The models on a GPU: the reference's values, float32 as on a CPU, and bfloat16 close to both."""

from larp.models.discriminator import Discriminator
from larp.models.generator import LarpGenerator, code_loss
from larp.models.losses import psnr
from larp.models.noise import BatchNoise
from larp.models.prior import PriorConfig, cross_entropy
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig
from larp.sampling.options import GuidedSampling
from larp.sampling.sample import generate
from tests.gpu.conftest import golden

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.gpu


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-4 of the largest value, as float32 on another processor is."""
    expected = expected.to(actual.device).reshape(actual.shape).float()
    torch.testing.assert_close(actual.float(), expected, rtol=1e-4, atol=1e-4 * max(1.0, expected.abs().max().item()))


def tokenizer(seed: int = 0, **changes) -> LarpTokenizer:
    """A tokenizer of the box's kind, sampled at random; its head is not zero."""
    torch.manual_seed(seed)
    sides = {f"{s}_{n}": v for s in ("encoder", "decoder") for n, v in dict(width=128, depth=3, heads=4).items()}
    prior = PriorConfig(depth=2, heads=2, width=64, positions=64, dropout=0.0)
    settings = dict(num_frames=8, height=32, width=32, patch_size=(4, 8, 8), num_tokens=64, codebook_size=1024)
    model = LarpTokenizer(TokenizerConfig(**settings | sides | {"prior": prior, "init": "balanced"} | changes)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.02)
    return model


def clips(rows: int = 8) -> torch.Tensor:
    """Smooth moving pictures: (rows, 3, 8, 32, 32) in [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(rows, 3, 3, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, (8, 32, 32), mode="trilinear").clamp(0, 1)


@torch.no_grad()
def test_the_tokenizer_gives_the_reference_values(device, exact):
    folder = golden("official_tokenizer")
    model, want = LarpTokenizer.from_pretrained(folder, device=device), load_file(folder / "expected.safetensors")
    clip = want["clip"].to(device)
    assert torch.equal(model.encode(clip).cpu(), want["codes"])
    assert torch.equal(model.encode(want["short_clip"].to(device)).cpu(), want["short_codes"])
    out = model(clip)
    close(model.project(clip), want["projected"])
    close(out.reconstruction, want["reconstruction"])
    close(out.quantized.commitment_loss, want["loss_commit"])
    close(out.quantized.codebook_loss, want["loss_codebook"])
    close(model.decode(want["codes"]), want["reconstruction_from_codes"].clamp(0, 1))


@torch.no_grad()
def test_the_prior_gives_the_reference_values(device, exact):
    folder = golden("official_tokenizer")
    model, want = LarpTokenizer.from_pretrained(folder, device=device), load_file(folder / "expected.safetensors")
    if model.prior is None:
        pytest.skip("these golden values came without the prior")
    given = want["quantized"][:, :-1].to(device)
    close(model.prior.predict(given), want["prior_prediction"][:, 1:])
    close(model.prior.logits(given, model.codebook), want["prior_logits"])
    close(cross_entropy(want["prior_logits"].to(device), want["codes"][:, 1:].to(device)), want["prior_cross_entropy"])
    close(model(want["clip"].to(device)).prior.loss, want["prior_cross_entropy"])


@torch.no_grad()
@pytest.mark.parametrize("task", ["class", "frame_prediction"])
def test_the_generators_give_the_reference_values(device, exact, task):
    folder = golden(f"official_generator_{task}")
    model, want = LarpGenerator.from_pretrained(folder, device=device), load_file(folder / "expected.safetensors")
    codes, condition = want["codes"].to(device), want["condition"].to(device)
    logits = model.eval()(codes, condition)
    close(logits, want["logits"])
    close(code_loss(logits, codes), want["loss"])
    assert torch.equal(generate(model, condition, GuidedSampling(top_k=1)).cpu(), want["greedy"])
    if task == "class":
        for scale in (1.25, 3.0):
            greedy = generate(model, condition, GuidedSampling(guidance_scale=scale, top_k=1))
            assert torch.equal(greedy.cpu(), want[f"greedy_cfg_{scale}"])


@torch.no_grad()
def test_the_discriminator_gives_the_reference_values(device, exact):
    folder = golden("official_discriminator")
    model, want = Discriminator.from_pretrained(folder, device=device), load_file(folder / "expected.safetensors")
    for side in ("real", "fake"):
        close(model(want[side].to(device)), want[f"logits_{side}"])


@torch.no_grad()
def test_float32_is_as_on_a_cpu(device, exact):
    here, there = tokenizer(), tokenizer().to(device)
    clip = clips()
    codes, codes_there = here.encode(clip), there.encode(clip.to(device)).cpu()
    assert (codes == codes_there).float().mean() > 0.998, "all but ties"
    close(there.decode(codes.to(device)), here.decode(codes))
    ours, theirs = (
        m(clip.to(m.queries.device), BatchNoise(0, 0, 8, device=m.queries.device), 0.5) for m in (here, there)
    )
    assert (ours.quantized.codes == theirs.quantized.codes.cpu()).float().mean() > 0.99, (
        "the samples are the same numbers"
    )
    assert theirs.prior.loss.item() == pytest.approx(ours.prior.loss.item(), rel=1e-2)


@torch.no_grad()
def test_bfloat16_encodes_and_decodes_close_to_float32(device):
    model = tokenizer().to(device)
    clip = clips().to(device)
    codes, frames = model.encode(clip), model.decode(model.encode(clip))
    half = tokenizer().to(device, torch.bfloat16)
    share = (half.encode(clip) == codes).float().mean().item()
    decoded = psnr(frames, half.decode(codes)).min().item()
    print(f"bfloat16: {share:.3f} of the codes are equal, decoding at {decoded:.1f} dB")
    assert share > SHARE and decoded > 40
    # Under autocast the weights stay float32, as they do in training.
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert (model.encode(clip) == codes).float().mean() > SHARE


@torch.no_grad()
def test_the_checks_of_values_stop_no_loop(device):
    """Codes and clips that are on the GPU are checked without reading a number back between two calls."""
    if device.type != "cuda":
        pytest.skip("a CPU has nothing to wait for")
    model, clip = tokenizer().to(device), clips().to(device)
    codes = model.encode(clip)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            model.decode(model.encode(clip))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(ValueError, match="codes run from"):
        model.decode(codes + 10**6)
    assert torch.equal(model.encode(clip), codes), "the GPU is as it was"


# Of codes sampled from random weights, which lie closer together than trained ones.
SHARE = 0.9
