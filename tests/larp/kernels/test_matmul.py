"""Matrix multiplication and attention by oneDNN equal torch's own, gradients included."""

import platform

from larp.kernels import matmul
from larp.models.layers import Attention, Block, Linear
from larp.models.losses import r1_penalty

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or not torch.backends.mkldnn.is_available(), reason="needs torch's oneDNN on x86"
)


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    """Use oneDNN on any processor and for small tensors; return the list of its calls."""
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(matmul, "_MIN_MULTIPLY_ADDS", 0)
    monkeypatch.setattr(matmul, "_MIN_KEYS", 0)
    monkeypatch.setattr(matmul, "_QUERY_CHUNK", 4)
    calls = []
    multiply = matmul._multiply
    monkeypatch.setattr(matmul, "_multiply", lambda *args: calls.append(1) or multiply(*args))
    return calls


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def value_with_gradients(function, *inputs):
    out = function(*inputs)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out, *torch.autograd.grad((out * weight).sum(), inputs)]


@pytest.mark.parametrize("bias", [True, False])
def test_linear(onednn, bias):
    x, weight = torch.randn(2, 5, 6, requires_grad=True), torch.randn(7, 6, requires_grad=True)
    inputs = (x, weight, torch.randn(7, requires_grad=True)) if bias else (x, weight)
    same(value_with_gradients(matmul.linear, *inputs), value_with_gradients(F.linear, *inputs))
    assert len(onednn) == 3  # the product and the gradients of both operands
    with torch.no_grad():
        same([matmul.linear(*inputs)], [F.linear(*inputs)])


def test_a_frozen_weight_costs_no_multiplication(onednn):
    x, layer = torch.randn(3, 6, requires_grad=True), Linear(6, 7).requires_grad_(False)
    layer(x).sum().backward()
    assert len(onednn) == 2 and layer.weight.grad is None and layer.bias.grad is None


@pytest.mark.parametrize(("queries", "causal"), [(9, False), (9, True), (3, False)])
def test_attention(onednn, queries, causal):
    # Views of one tensor, as in the layers.
    q, k, v = torch.randn(2, 9, 3, 2, 4).permute(2, 0, 3, 1, 4)
    inputs = [t.detach().requires_grad_() for t in (q[:, :, -queries:], k, v)]
    same(
        value_with_gradients(lambda *t: matmul.attention(*t, is_causal=causal), *inputs),
        value_with_gradients(lambda *t: F.scaled_dot_product_attention(*t, is_causal=causal), *inputs),
    )
    assert onednn


def test_the_backward_pass_samples_the_same_dropout():
    q, k, v = (torch.randn(1, 2, 6, 4, dtype=torch.float32, requires_grad=True) for _ in range(3))

    def dropped(*inputs):
        torch.manual_seed(3)
        return matmul.attention(*inputs, is_causal=True, dropout=0.3)

    assert torch.equal(dropped(q, k, v), dropped(q, k, v))
    assert not torch.equal(dropped(q, k, v), matmul.attention(q, k, v, is_causal=True))
    (slope,) = torch.autograd.grad(dropped(q, k, v).sum(), q)
    step = 1e-2 * torch.randn(q.shape)
    with torch.no_grad():
        rise = (dropped(q + step, k, v).sum() - dropped(q - step, k, v).sum()) / 2
    torch.testing.assert_close(rise, (slope * step).sum(), rtol=1e-2, atol=1e-4)


def test_dropout_keeps_the_mean():
    q, k, v = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    mean = torch.stack([matmul.attention(q, k, v, dropout=0.2) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=0.1)


def test_autocast_and_other_dtypes_use_torch(onednn):
    layer, x = Linear(6, 7), torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.double()(x.double()).dtype == torch.float64
    assert not onednn


def test_second_derivatives_for_r1():
    attention = nn.Sequential(Attention(8, 2), nn.Flatten(), Linear(40, 1))
    clip = torch.randn(2, 5, 8)
    penalty = r1_penalty(attention, clip)
    ours = torch.autograd.grad(penalty, attention[0].qkv.weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "onednn_is_faster", lambda: False)
        again = r1_penalty(attention, clip)
        same([penalty, *ours], [again, *torch.autograd.grad(again, attention[0].qkv.weight)])


def test_an_operator_that_raises_or_is_wrong_is_not_used(monkeypatch):
    assert matmul._operator_works()
    monkeypatch.setattr(matmul, "_multiply", lambda x, weight: x @ weight.T + 1)
    assert not matmul._operator_works()

    def changed(x, weight):
        raise RuntimeError("expected 7 arguments")

    monkeypatch.setattr(matmul, "_multiply", changed)
    assert not matmul._operator_works()


def test_compiled_blocks_use_torch(onednn):
    explained = torch._dynamo.explain(Linear(6, 7))(torch.randn(3, 6))
    assert explained.graph_break_count == 0 and not onednn


def test_a_block_over_many_keys_is_one_compiled_graph():
    """An operation that torch.compile does not support would split each block into several graphs."""
    block, x = Block(32, 2, eps=1e-6), torch.randn(1, 520, 32)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(x, 260), block(x, 260))
