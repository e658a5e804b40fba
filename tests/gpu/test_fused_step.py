"""The fused kernels of the sampler's step, beside the plain one. They need a GPU: a CPU rehearsal skips them."""

from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.sampling import reused_decoder
from larp.sampling.decoder import Decoder
from larp.sampling.options import GuidedSampling
from larp.sampling.sample import generate

import pytest
import torch

pytestmark = pytest.mark.gpu


def sampled(device: torch.device, **fields) -> LarpGenerator:
    """A generator whose norms are not one and whose head is not zero."""
    if device.type != "cuda":
        pytest.skip("the kernels are for a GPU")
    torch.manual_seed(0)
    shape = dict(num_tokens=300, codebook_size=512, depth=3, heads=4, width=256, num_classes=4) | fields
    model = LarpGenerator(GeneratorConfig(**shape))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.2 if name.startswith("output") else 0.05)
    return model.to(device).eval()


@pytest.mark.parametrize("fields", [{}, {"width": 128, "heads": 1}, {"task": "frame-prediction", "num_tokens": 150}])
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_logits_are_those_of_the_plain_step(device, exact, rows, dtype, near, fields):
    model = sampled(device, **fields)
    condition = torch.arange(rows, device=device)
    if model.config.task != "class":
        condition = model.frame_condition(torch.randint(512, (rows, model.config.num_tokens), device=device))
    plain, fused = (Decoder(model, rows, weights=weights, dtype=dtype) for weights in ("plain", "fused"))
    want, got = plain.prefill(condition), fused.prefill(condition)
    assert (got - want).abs().max() < near * want.abs().max()
    codes = torch.randint(512, (model.config.num_tokens - 1, rows), device=device)
    for own in codes:
        want, got = plain.decode_one(own), fused.decode_one(own)
        assert (got - want).abs().max() < near * want.abs().max()


def test_captured_steps_draw_what_eager_ones_draw(device, monkeypatch):
    model = sampled(device)
    options = dict(sampling=GuidedSampling(guidance_scale=1.5), seed=3, weights="fused", dtype=torch.bfloat16)
    captured = generate(model, torch.tensor([1]), **options)
    assert torch.equal(captured, generate(model, torch.tensor([1]), **options))
    reused_decoder.clear()
    monkeypatch.setattr("larp.sampling.decoder.CapturedSteps", lambda step: step)
    assert torch.equal(captured, generate(model, torch.tensor([1]), **options))
    assert captured.unique().numel() > 50


def test_unsupported_rows_are_an_error(device):
    model = sampled(device)
    with pytest.raises(ValueError, match=r"do not support 3 rows \(at most 2\)"):
        Decoder(model, 3, weights="fused")


@torch.no_grad()
def test_no_bit_depends_on_how_the_kernels_are_launched(device):
    model = sampled(device)
    decoder, codes = Decoder(model, 2, weights="fused", dtype=torch.bfloat16), torch.tensor([5, 6], device=device)
    from larp.sampling.decoder_kernels import Launch, Shape

    every = {name: Shape(8, 1) for name in ("qkv", "wo", "gate", "w2", "head")}
    others = [Launch(), Launch(pdl=decoder.fused.launch.pdl, gate_ahead=1.0, qkv_ahead=0.5), Launch(**every)]
    others.append(
        Launch(qkv=Shape(2, 4), wo=Shape(2, 1), gate=Shape(4, 1, 96), w2=Shape(2, 2), pdl=decoder.fused.launch.pdl)
    )
    seen = []
    for launch in (decoder.fused.launch, *others):
        decoder.fused.launch = launch
        decoder.prefill(torch.tensor([0, 1], device=device))
        seen.append(torch.stack([decoder.decode_one(codes) for _ in range(200)]))
    assert all(torch.equal(seen[0], one) for one in seen[1:])


@torch.no_grad()
def test_bfloat16_of_few_rows_is_fused_by_itself(device):
    model = sampled(device)
    assert Decoder(model, 2, dtype=torch.bfloat16).fused is not None
    assert Decoder(model, 2).fused is None and Decoder(model, 3, dtype=torch.bfloat16).fused is None
