"""LarpTokenizer against the reference's golden values, and what a user may rely on."""

from larp.hub import CheckpointError
from larp.noise import BatchNoise
from larp.prior import PriorConfig, cross_entropy
from larp.tokenizer import LarpTokenizer, TokenizerConfig

import pytest
import torch
from safetensors.torch import load_file


def tiny(**changes) -> TokenizerConfig:
    settings = dict(num_frames=4, height=16, width=24, patch_size=(2, 8, 8), num_tokens=6, codebook_size=32, code_dim=8)
    for side in ("encoder", "decoder"):
        settings |= {f"{side}_width": 32, f"{side}_depth": 2, f"{side}_heads": 4}
    settings["prior"] = PriorConfig(depth=1, heads=2, width=16, positions=6, dropout=0.0)
    return TokenizerConfig(**settings | changes)


@pytest.fixture(scope="module")
def golden(golden_root):
    folder = golden_root / "official_tokenizer"
    return LarpTokenizer.from_pretrained(folder), load_file(folder / "expected.safetensors")


def close(actual, expected):
    torch.testing.assert_close(
        actual.float(), expected.float().reshape(actual.shape), rtol=1e-5, atol=1e-5 * expected.abs().max().item()
    )


@torch.no_grad()
def test_golden_latents_codes_and_reconstruction(golden):
    model, want = golden
    projected = model.project(want["clip"])
    close(projected, want["projected"])
    close(model.quantizer.probabilities(projected)[:, 0], want["code_probabilities_first"])
    close(model.codebook, want["codebook_normalized"])
    assert torch.equal(model.encode(want["clip"]), want["codes"])
    out = model(want["clip"])
    close(out.quantized.latents, want["quantized"])
    close(out.reconstruction, want["reconstruction"])
    close(model.render(model.quantizer.lookup(want["codes"])), want["reconstruction_from_codes"])
    assert torch.equal(model.decode(want["codes"]), model.render(model.quantizer.lookup(want["codes"])).clamp(0, 1))


@torch.no_grad()
def test_golden_losses_and_prior(golden):
    model, want = golden
    out = model(want["clip"])
    close(out.quantized.commitment_loss, want["loss_commit"])
    close(out.quantized.codebook_loss, want["loss_codebook"])
    close(out.quantized.codebook_loss + 0.25 * out.quantized.commitment_loss, want["loss_quantizer"])
    close(model.prior.predict(want["quantized"][:, :-1]), want["prior_prediction"][:, 1:])
    close(model.prior.logits(want["quantized"][:, :-1], model.codebook), want["prior_logits"])
    close(cross_entropy(want["prior_logits"], want["codes"][:, 1:]), want["prior_cross_entropy"])
    close(out.prior.loss, want["prior_cross_entropy"])


@torch.no_grad()
def test_golden_shorter_clip(golden):
    model, want = golden
    assert torch.equal(model.encode(want["short_clip"]), want["short_codes"])
    close(model(want["short_clip"]).reconstruction, want["short_reconstruction"])


def test_published_size():
    with torch.device("meta"):
        model = LarpTokenizer(TokenizerConfig())
    prior = sum(p.numel() for p in model.prior.parameters())
    assert round(prior / 1e6, 1) == 21.7
    # 172.2 M learned numbers; the paper prints 173 M.
    assert abs((model.num_parameters() - prior) / 173e6 - 1) < 0.006


def test_save_load_round_trip(tmp_path):
    model = LarpTokenizer(tiny(decoder_patch_size=(4, 4, 8))).eval()
    torch.nn.init.normal_(model.head.weight, std=0.05)
    again = LarpTokenizer.from_pretrained(model.save_pretrained(tmp_path / "m"))
    assert again.config == model.config and again.weight_hash() == model.weight_hash()
    clip = torch.rand(3, 3, 4, 16, 24)
    codes = model.encode(clip)
    assert torch.equal(codes, again.encode(clip)) and codes.shape == (3, 6) and codes.dtype == torch.int64
    assert torch.equal(model.decode(codes), again.decode(codes))
    with torch.no_grad():
        again.queries.add_(1e-3)
    assert again.weight_hash() != model.weight_hash()


def test_draws_follow_the_probabilities_and_not_the_split():
    model = LarpTokenizer(tiny(temperature=0.3))
    clip = torch.rand(8, 3, 4, 16, 24)
    whole = model(clip, BatchNoise(1, 5, 8), mix=0.5)
    halves = [model(clip[i : i + 4], BatchNoise(1, 5, 8, i, 4), mix=0.5) for i in (0, 4)]
    assert torch.equal(whole.quantized.codes, torch.cat([h.quantized.codes for h in halves]))
    torch.testing.assert_close(whole.prior.loss, torch.stack([h.prior.loss for h in halves]).mean())
    latents = model.project(clip[:1])
    wanted = model.quantizer.probabilities(latents)[0, 0]
    drawn = model.quantizer(latents.expand(4000, -1, -1), BatchNoise(0, 0, 4000).uniform(6)).codes[:, 0]
    share = torch.bincount(drawn, minlength=32) / 4000
    assert (share - wanted).abs().max() < 0.04 and (share > 0).sum() > 3


def test_gradients_reach_what_they_should():
    model = LarpTokenizer(tiny())
    torch.nn.init.normal_(model.head.weight, std=0.05)
    out = model(torch.rand(2, 3, 4, 16, 24), BatchNoise(0, 0, 2), mix=0.5)
    out.prior.loss.backward(retain_graph=True)
    assert model.queries.grad.abs().sum() > 0, "the prior shapes the encoder"
    assert model.quantizer.embedding.weight.grad is None, "the prior sees the codebook detached"
    model.zero_grad()
    out.quantized.commitment_loss.backward(retain_graph=True)
    assert model.quantizer.embedding.weight.grad is None
    out.quantized.codebook_loss.backward()
    assert model.quantizer.embedding.weight.grad.abs().sum() > 0


def test_without_prior_and_without_quantizer():
    model = LarpTokenizer(tiny(prior=PriorConfig(enabled=False)))
    assert not any(name.startswith("prior") for name in model.state_dict())
    assert model(torch.rand(1, 3, 4, 16, 24)).prior is None
    assert model(torch.rand(1, 3, 4, 16, 24), quantize=False).quantized is None


@pytest.mark.parametrize(
    "clip, words",
    [
        (torch.rand(3, 4, 16, 24), "shape"),
        (torch.rand(1, 3, 4, 16, 16), "24"),
        (torch.rand(1, 3, 3, 16, 24), "multiples of 2"),
        (torch.zeros(1, 3, 4, 16, 24, dtype=torch.uint8), "divide uint8"),
        (torch.full((1, 3, 4, 16, 24), 1.5), "1.5"),
        (torch.full((1, 3, 4, 16, 24), float("nan")), "nan"),
    ],
)
def test_bad_clips(clip, words):
    with pytest.raises(ValueError, match=words):
        LarpTokenizer(tiny()).encode(clip)


@pytest.mark.parametrize(
    "codes, words",
    [
        (torch.zeros(1, 5, dtype=torch.long), "shape"),
        (torch.zeros(1, 6), "integer"),
        (torch.full((1, 6), 32), "0..31"),
        (torch.full((1, 6), -1), "-1"),
    ],
)
def test_bad_codes(codes, words):
    with pytest.raises(ValueError, match=words):
        LarpTokenizer(tiny()).decode(codes)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_frames": 5}, "num_frames = 5"),
        ({"height": 20}, "height = 20"),
        ({"decoder_patch_size": (2, 5, 8)}, "decoder_patch_size"),
        ({"encoder_heads": 5}, "encoder_heads = 5"),
        ({"num_tokens": 7}, "prior.positions = 6"),
    ],
)
def test_bad_configs(change, words):
    with pytest.raises(ValueError, match=words):
        tiny(**change)


def test_damaged_checkpoints(tmp_path):
    folder = LarpTokenizer(tiny()).save_pretrained(tmp_path / "m")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"num_tokens": 6', '"num_tokens": 5'))
    with pytest.raises(CheckpointError, match="queries"):
        LarpTokenizer.from_pretrained(folder)
    (folder / "config.json").write_text(text.replace('"num_tokens"', '"num_token"'))
    with pytest.raises(ValueError, match="num_tokens"):
        LarpTokenizer.from_pretrained(folder)
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="truncated"):
        LarpTokenizer.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        LarpTokenizer.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        LarpTokenizer.from_pretrained(tmp_path / "absent" / "x")
