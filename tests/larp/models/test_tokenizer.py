"""LarpTokenizer: golden values of the reference, sampling, nested prefixes, invalid inputs, checkpoints."""

from larp.hub import CheckpointError
from larp.models.losses import psnr
from larp.models.noise import BatchNoise
from larp.models.prior import PriorConfig, cross_entropy
from larp.models.tokenizer import LarpTokenizer, sample_prefix_lengths
from larp.models.tokenizer_config import TokenizerConfig

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
    close(model.decode_latents(model.quantizer.lookup(want["codes"])), want["reconstruction_from_codes"])
    assert torch.equal(
        model.decode(want["codes"]), model.decode_latents(model.quantizer.lookup(want["codes"])).clamp(0, 1)
    )


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


@pytest.mark.parametrize(("size", "millions"), [("S", 39.3), ("B", 115.5), ("L", 172.2)])
def test_parameters_of_the_named_sizes(size, millions):
    """Trainable parameters without the prior. The paper has 173 M for L; its fixed position tables are 0.8 M each."""
    with torch.device("meta"):
        model = LarpTokenizer(TokenizerConfig.of_size(size))
    prior = sum(p.numel() for p in model.prior.parameters())
    assert round(prior / 1e6, 1) == 21.7
    assert round((model.num_parameters() - prior) / 1e6, 1) == millions
    assert TokenizerConfig.of_size("L") == TokenizerConfig()


def test_a_named_size_with_other_fields_and_an_unknown_size():
    config = TokenizerConfig.of_size("S", num_tokens=256, decoder_depth=3)
    assert (config.num_tokens, config.encoder_depth, config.decoder_depth, config.encoder_width) == (256, 6, 3, 512)
    with pytest.raises(ValueError, match="unknown tokenizer size 'XL'; the sizes are S, B, L"):
        TokenizerConfig.of_size("XL")


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


def test_samples_follow_the_probabilities_and_not_the_split():
    model = LarpTokenizer(tiny(temperature=0.3))
    clip = torch.rand(8, 3, 4, 16, 24)
    whole = model(clip, BatchNoise(1, 5, 8), mix=0.5)
    halves = [model(clip[i : i + 4], BatchNoise(1, 5, 8, i, 4), mix=0.5) for i in (0, 4)]
    assert torch.equal(whole.quantized.codes, torch.cat([h.quantized.codes for h in halves]))
    torch.testing.assert_close(whole.prior.loss, torch.stack([h.prior.loss for h in halves]).mean())
    latents = model.project(clip[:1])
    expected = model.quantizer.probabilities(latents)[0, 0]
    sampled = model.quantizer(latents.expand(4000, -1, -1), BatchNoise(0, 0, 4000).uniform(6)).codes[:, 0]
    share = torch.bincount(sampled, minlength=32) / 4000
    assert (share - expected).abs().max() < 0.04 and (share > 0).sum() > 3


def test_which_parameters_get_gradients():
    model = LarpTokenizer(tiny())
    torch.nn.init.normal_(model.head.weight, std=0.05)
    out = model(torch.rand(2, 3, 4, 16, 24), BatchNoise(0, 0, 2), mix=0.5)
    out.prior.loss.backward(retain_graph=True)
    assert model.queries.grad.abs().sum() > 0, "the prior trains the encoder"
    assert model.quantizer.embedding.weight.grad is None, "the prior gets the codebook detached"
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


def nested_model(**changes) -> LarpTokenizer:
    model = LarpTokenizer(tiny(nested=True, **changes)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.05)
    torch.nn.init.normal_(model.out_linear.weight)
    return model


def test_any_prefix_of_a_nested_model_encodes_and_decodes():
    model, clip = nested_model(), torch.rand(2, 3, 4, 16, 24)
    codes = model.encode(clip)
    for length in range(1, 7):
        assert torch.equal(model.encode(clip, num_tokens=length), codes[:, :length])
        shorter = model.decode(codes[:, :length])
        with torch.no_grad():
            masked = model.mask(model.quantizer.lookup(codes), torch.tensor([length, length]))
            torch.testing.assert_close(shorter, model.decode_latents(masked).clamp(0, 1))
    assert not torch.equal(model.decode(codes[:, :5]), model.decode(codes))
    with pytest.raises(ValueError, match="not both"):
        model.encode(clip, num_tokens=3, target_psnr=20.0)
    for length in (0, 7):
        with pytest.raises(ValueError, match="1 to 6"):
            model.encode(clip, num_tokens=length)
    with pytest.raises(ValueError, match="nested"):
        LarpTokenizer(tiny()).encode(clip, num_tokens=3)
    with pytest.raises(ValueError, match="nested"):
        LarpTokenizer(tiny()).encode(clip, target_psnr=20.0)
    with pytest.raises(ValueError, match="positive"):
        model.encode(clip, target_psnr=-3.0)


def test_the_target_psnr_takes_the_fewest_codes():
    model, clip = nested_model(), torch.rand(4, 3, 4, 16, 24)
    codes = model.encode(clip)
    with torch.no_grad():
        reached = torch.stack([psnr(clip, model.decode(codes[:, :n])) for n in range(1, 7)])
    # Without training a longer prefix may be worse; bisection finds a crossing of the target.
    target = reached[3, 0].item()
    needed = model.shortest_prefix(clip, codes, target)
    for row, n in enumerate(needed.tolist()):
        assert n == 6 or reached[n - 1, row] >= target
        assert n == 1 or reached[n - 2, row] < target
    assert model.encode(clip, target_psnr=target).shape == (4, int(needed.max()))
    assert model.encode(clip, target_psnr=1000.0).shape == (4, 6), "out of reach: all of them"
    assert model.encode(clip, target_psnr=0.01).shape == (4, 1)


def test_nested_dropout_selects_prefixes_and_trains_the_mask():
    lengths = sample_prefix_lengths(BatchNoise(0, 0, 4000), 0.5, 2, 6)
    counts = torch.bincount(lengths, minlength=7) / 4000
    assert counts[:2].sum() == 0 and (counts[2:6] - 0.1).abs().max() < 0.02 and abs(counts[6] - 0.6) < 0.03
    model, clip = nested_model(), torch.rand(2, 3, 4, 16, 24)
    out = model(clip, prefix_lengths=torch.tensor([2, 6]))
    codes = model.encode(clip)
    torch.testing.assert_close(out.reconstruction[:1].clamp(0, 1), model.decode(codes[:1, :2]))
    torch.testing.assert_close(out.reconstruction[1:].clamp(0, 1), model.decode(codes[1:]))
    out.reconstruction.sum().backward()
    assert model.mask_latent.grad.abs().sum() > 0
    assert "mask_latent" not in LarpTokenizer(tiny()).state_dict()


def test_an_image_is_a_clip_of_one_temporal_patch():
    model = LarpTokenizer(tiny())
    image = torch.rand(2, 3, 1, 16, 24)
    codes = model.encode(image)
    assert torch.equal(codes, model.encode(image.expand(-1, -1, 2, -1, -1)))
    assert model.decode(codes, num_frames=2).shape == (2, 3, 2, 16, 24)


def test_the_temperature_of_the_samples_can_be_set():
    model, clip = LarpTokenizer(tiny(temperature=5.0)), torch.rand(8, 3, 4, 16, 24)
    nearest = model.encode(clip)
    sampled, cold = (model(clip, BatchNoise(0, 0, 8), temperature=t).quantized.codes for t in (None, 1e-4))
    assert (sampled == nearest).float().mean() < 0.5 < (cold == nearest).float().mean()


@pytest.mark.parametrize(
    "clip, words",
    [
        (torch.rand(3, 4, 16, 24), "shape"),
        (torch.rand(1, 3, 4, 16, 16), "24"),
        (torch.rand(1, 3, 3, 16, 24), "multiples of 2"),
        (torch.zeros(1, 3, 4, 16, 24, dtype=torch.uint8), "divide uint8"),
        (torch.full((1, 3, 4, 16, 24), 1.5), "1.5"),
        (torch.full((1, 3, 4, 16, 24), float("nan")), "nan"),
        (torch.rand(1, 3, 4, 16, 24).double(), r"float64.*\.float\(\)"),
        (torch.rand(1, 3, 4, 16, 24).half(), r"float16.*\.float\(\)"),
        (torch.rand(0, 3, 4, 16, 16), "24"),
        (torch.rand(1, 3, 4, 16, 24).numpy(), r"ndarray.*torch\.as_tensor"),
        ([0.5], "list"),
        (None, "NoneType"),
    ],
)
def test_bad_clips(clip, words):
    with pytest.raises(ValueError, match=words):
        LarpTokenizer(tiny()).encode(clip)


@pytest.mark.parametrize(
    "codes, words",
    [
        (torch.zeros(5, dtype=torch.long), "shape"),
        (torch.zeros(1, 5, dtype=torch.long), "5 codes.*--model.nested"),
        (torch.zeros(1, 7, dtype=torch.long), "7 codes"),
        (torch.zeros(1, 6), "integer"),
        (torch.full((1, 6), 32), "0..31"),
        (torch.full((1, 6), -1), "-1"),
        (torch.zeros(1, 6, dtype=torch.complex64), "integer codes, got torch.complex64"),
        (torch.zeros(1, 6, dtype=torch.bool), "integer"),
        (torch.full((1, 6), 2**63, dtype=torch.uint64), "0..31"),
        (torch.zeros(1, 6).numpy(), "ndarray"),
        ([[0] * 6], "list"),
        (None, "NoneType"),
    ],
)
def test_bad_codes(codes, words):
    with pytest.raises(ValueError, match=words):
        LarpTokenizer(tiny()).decode(codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64])
def test_codes_of_any_integer_dtype_decode(dtype):
    model, codes = nested_model(), torch.arange(6)[None]
    assert torch.equal(model.decode(codes.to(dtype)), model.decode(codes))


def test_an_empty_batch_has_no_codes():
    model, clip = nested_model(), torch.rand(0, 3, 4, 16, 24)
    assert model.encode(clip).shape == (0, 6) and model.encode(clip).dtype == torch.int64
    assert model.encode(clip, num_tokens=2).shape == (0, 2) and model.encode(clip, target_psnr=20.0).shape == (0, 1)
    assert model.decode(model.encode(clip)).shape == clip.shape


def test_a_clip_may_have_the_dtype_of_the_weights():
    model, clip = nested_model().bfloat16(), torch.rand(2, 3, 4, 16, 24)
    assert torch.equal(model.encode(clip), model.encode(clip.bfloat16())), "float32 is computed in the weights' dtype"
    with pytest.raises(
        ValueError, match=r"the weights are torch\.bfloat16\), got torch\.float16.*\.to\(torch\.bfloat16\)"
    ):
        model.encode(clip.half())


@pytest.mark.parametrize("number", [3.5, "3", True])
def test_a_number_of_codes_or_frames_must_be_whole(number):
    model, clip = nested_model(), torch.rand(1, 3, 4, 16, 24)
    with pytest.raises(ValueError, match="whole number"):
        model.encode(clip, num_tokens=number)
    with pytest.raises(ValueError, match="frames do not fit"):
        model.decode(model.encode(clip), num_frames=number)


@pytest.mark.parametrize("target", ["20", True, float("nan")])
def test_a_target_psnr_must_be_a_number(target):
    with pytest.raises(ValueError, match="positive number of dB"):
        nested_model().encode(torch.rand(1, 3, 4, 16, 24), target_psnr=target)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_frames": 5}, "num_frames = 5"),
        ({"height": 20}, "height = 20"),
        ({"decoder_patch_size": (2, 5, 8)}, "decoder_patch_size"),
        ({"encoder_heads": 5}, "encoder_heads = 5"),
        ({"num_tokens": 7}, "prior.positions = 6"),
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"height": -16}, "height"),
        ({"width": 0}, "width"),
        ({"encoder_width": 0}, "encoder_width must be at least 1"),
        ({"decoder_width": -32}, "decoder_width"),
        ({"encoder_heads": 0}, "encoder_heads"),
        ({"decoder_heads": -4}, "decoder_heads"),
        ({"temperature": float("nan")}, "temperature must be positive and finite"),
        ({"temperature": float("inf")}, "temperature must be positive and finite"),
        ({"patch_size": (2, 8)}, "'patch_size'.*3 values"),
        ({"num_tokens": 16.5}, "'num_tokens' is 16.5.*whole number"),
        ({"num_tokens": True}, "'num_tokens'"),
        ({"init": "orthogonal"}, "'init'.*'published', 'balanced'"),
        ({"prior": None}, "'prior' is a group of options"),
    ],
)
def test_bad_configs(change, words):
    with pytest.raises(ValueError, match=words):
        tiny(**change)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"depth": 0}, r"prior\.depth must be at least 1"),
        ({"width": 0}, r"prior\.width"),
        ({"heads": -2}, r"prior\.heads"),
        ({"dropout": 1.0}, r"prior\.dropout"),
        ({"dropout": -0.1}, r"prior\.dropout"),
        ({"dropout": float("nan")}, r"prior\.dropout"),
        ({"temperature": float("nan")}, r"prior\.temperature"),
        ({"positions": 6.0}, "'positions' is 6.0.*whole number"),
    ],
)
def test_bad_configs_of_the_prior(change, words):
    with pytest.raises(ValueError, match=words):
        PriorConfig(**change)


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
