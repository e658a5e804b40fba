"""Attention in bfloat16 on CPUs against torch's in float32, gradients included."""

from larp.kernels import bf16_attention, matmul
from larp.models.layers import Attention
from larp.models.losses import r1_penalty

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs torch's oneDNN")

# Error against that of torch's fused attention in bfloat16, which has scores in float32 (LOG.md).
WORSE = 2.2


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Use our attention on any processor; return the list of its calls."""
    monkeypatch.setattr(bf16_attention, "fused_is_slow", lambda: True)
    calls, ours = [], bf16_attention.attention
    monkeypatch.setattr(bf16_attention, "attention", lambda *args: calls.append(1) or ours(*args))
    return calls


@pytest.fixture(params=["stored", "recomputed"])
def weights(request, monkeypatch):
    """Attention weights that are stored for the backward pass, or recomputed in several chunks of queries and heads."""
    if request.param == "recomputed":
        monkeypatch.setattr(bf16_attention, "_MIN_KEYS_TO_RECOMPUTE", 0)
        monkeypatch.setattr(bf16_attention, "_QUERY_CHUNK", 16)
        monkeypatch.setattr(bf16_attention, "_WEIGHTS", 16 * 40 * 4)


def inputs(queries=40, keys=40):
    q, k, v = torch.randn(2, keys, 3, 3, 16, generator=torch.Generator().manual_seed(0)).permute(2, 0, 3, 1, 4)
    # Views of one tensor, as in the layers, and scores of deviation 2, for a softmax that is not flat.
    return [x.detach().requires_grad_() for x in (2 * q[:, :, -queries:], k, v)]


def value_with_gradients(function, tensors, **options):
    out = function(*tensors, **options)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out, *torch.autograd.grad((out.float() * weight).sum(), tensors)]


def relative_errors(ours, exact):
    return [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(ours, exact, strict=True)]


@pytest.mark.parametrize(("queries", "causal"), [(40, False), (40, True), (7, False)])
@pytest.mark.parametrize("autocast", [True, False])
def test_close_to_float32(weights, calls, queries, causal, autocast):
    exact = inputs(queries)
    given = exact if autocast else [x.detach().bfloat16().requires_grad_() for x in exact]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = value_with_gradients(matmul.attention, given, is_causal=causal)
    assert calls and found[0].dtype == torch.bfloat16 and [x.dtype for x in found[1:]] == [x.dtype for x in given]
    wanted = value_with_gradients(F.scaled_dot_product_attention, exact, is_causal=causal)
    with torch.autocast("cpu", torch.bfloat16):
        torchs = value_with_gradients(F.scaled_dot_product_attention, exact, is_causal=causal)
    for ours, theirs in zip(relative_errors(found, wanted), relative_errors(torchs, wanted), strict=True):
        assert ours < WORSE * theirs < 0.03


def test_autocast_rounds_a_mixture_of_dtypes(weights, calls):
    q, k, v = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        mixed, rounded = matmul.attention(q.bfloat16(), k, v), matmul.attention(q, k, v)
    assert len(calls) == 2 and torch.equal(mixed, rounded)


def test_other_dtypes_are_left_to_torch(calls):
    q, k, v = inputs()
    with torch.autocast("cpu", torch.float16):
        assert matmul.attention(q, k, v).dtype == torch.float16
    assert matmul.attention(q, k, v).dtype == torch.float32
    assert matmul.attention(q.double(), k.double(), v.double()).dtype == torch.float64
    assert not calls


def test_dropout(weights):
    tensors = [x.detach().bfloat16().requires_grad_() for x in inputs()]

    def dropped(q, k, v):
        torch.manual_seed(3)
        return matmul.attention(q, k, v, dropout=0.3)

    assert torch.equal(dropped(*tensors), dropped(*tensors))
    # The output is linear in v, so its gradient shows whether the backward pass has the same mask.
    gradient = torch.autograd.grad(dropped(*tensors).float().sum(), tensors[2])[0]
    torch.testing.assert_close(
        (gradient * tensors[2]).float().sum(), dropped(*tensors).float().sum(), rtol=0.02, atol=1
    )
    mean = torch.stack([matmul.attention(*tensors, dropout=0.3).detach().float() for _ in range(400)]).mean(0)
    assert relative_errors([mean], [matmul.attention(*tensors)])[0] < 0.05


def test_gradients_through_dropout_match_those_of_the_same_mask(weights, monkeypatch):
    """With ones on the kept weights in place of random numbers, forward and backward are plain attention."""
    tensors = inputs()

    def without_early_keys(weights, dropout, generator):
        return torch.ones_like(weights).index_fill_(-1, torch.tensor([0, 1]), 0)

    monkeypatch.setattr(bf16_attention, "_dropout_mask", without_early_keys)
    monkeypatch.setattr(bf16_attention, "_MIN_KEYS_TO_RECOMPUTE", 0)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_with_gradients(matmul.attention, tensors, dropout=0.5)

    def exact(q, k, v):
        weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
        return weights.index_fill(-1, torch.tensor([0, 1]), 0) @ v

    assert max(relative_errors(found, value_with_gradients(exact, tensors))) < 0.015


def test_second_derivatives_for_r1(calls):
    attention = nn.Sequential(Attention(8, 2), nn.Flatten(), nn.Linear(40, 1))
    with torch.autocast("cpu", torch.bfloat16):
        penalty = r1_penalty(attention, torch.randn(2, 5, 8))
    penalty.backward()
    assert not calls and attention[0].qkv.weight.grad.isfinite().all()


def test_the_processor_decides(monkeypatch, tmp_path):
    flags = bf16_attention._flags
    processor = tmp_path / "cpuinfo"
    processor.write_text("processor : 0\nflags\t\t: fpu avx512_bf16 amx_bf16\n")
    assert flags(processor) == {"fpu", "avx512_bf16", "amx_bf16"}
    processor.write_text("processor : 0\nFeatures : bf16\n")
    assert flags(processor) == set()
