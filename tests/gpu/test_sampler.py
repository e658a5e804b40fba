"""Sampling with captured CUDA graphs: the codes that the same steps give one kernel at a time."""

from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.sampling import decoder as decoding
from larp.sampling import reused_decoder
from larp.sampling.options import GuidedSampling
from larp.sampling.sample import generate

import pytest
import torch

pytestmark = pytest.mark.gpu

# More than one stride of the attended length: two graphs, and the change between them.
CODES = 300


@pytest.fixture(scope="module")
def model(device) -> LarpGenerator:
    torch.manual_seed(0)
    config = GeneratorConfig(num_tokens=CODES, codebook_size=512, depth=2, heads=4, width=128, num_classes=4)
    made = LarpGenerator(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made.to(device).eval()


def eager(monkeypatch) -> None:
    """Run every step as it is."""
    reused_decoder.clear()
    monkeypatch.setattr(decoding, "CapturedSteps", lambda step: step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4])
def test_captured_steps_draw_what_eager_ones_draw(model, device, monkeypatch, rows, dtype):
    labels = torch.arange(rows) % 4
    sampling = GuidedSampling(guidance_scale=1.5, guidance_final=3.0, top_k=100, top_p=0.95, min_p=0.001)
    options = dict(sampling=sampling, seed=3, dtype=dtype)
    captured = generate(model, labels, **options)
    again = generate(model, labels, **options)
    assert torch.equal(captured, again) and captured.unique().numel() > 50
    eager(monkeypatch)
    plain = generate(model, labels, **options)
    assert torch.equal(captured, plain)


def test_captured_steps_attend_to_what_the_plain_forward_does(model, device, exact):
    """Greedy codes of the sampler are the likeliest ones of one pass over them all, but for ties."""
    labels = torch.arange(2, device=device)
    codes = generate(model, labels, GuidedSampling(temperature=0))
    with torch.no_grad():
        logits = model(codes, labels)
    best = logits.max(-1).values
    chosen = logits.gather(-1, codes[..., None])[..., 0]
    assert (best - chosen).max() < 1e-2 * logits.abs().max()
    assert (logits.argmax(-1) == codes).float().mean() > 0.99


def test_a_step_waits_for_nothing(model, device):
    """No number is read back between the codes: that would stop the device at each of them."""
    if device.type != "cuda":
        pytest.skip("a CPU has nothing to wait for")
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    decoder = decoding.Decoder(model, 1)
    codes = torch.zeros(1, CODES, dtype=torch.int64, device=device)
    decoder.prefill(labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder.decode_n(codes, lambda logits, index: logits.argmax(-1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
