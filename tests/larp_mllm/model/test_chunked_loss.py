"""The loss of a head in pieces: the same numbers and gradients as all logits at once, without them."""

from larp_mllm.model import chunked_loss as heads
from larp_mllm.model.chunked_loss import Head, score
from larp_mllm.model.modeling import LarpMllmForCausalLM
from tests.larp_mllm.families import FAMILIES

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

WIDTH, CLASSES, POSITIONS = 8, 50, 23


class Subject:
    """A head with a bias and two rows more, hidden states and targets, all the same each time."""

    def __init__(self, dtype=torch.float32, trained: bool = True, cut: bool = False):
        torch.manual_seed(0)
        self.module = nn.Linear(WIDTH, CLASSES, dtype=dtype).requires_grad_(trained)
        self.rows = torch.randn(2, WIDTH, dtype=dtype, requires_grad=True)
        self.hidden = torch.randn(POSITIONS, WIDTH, dtype=dtype, requires_grad=True)
        self.targets = torch.randint(0, CLASSES + 2, (POSITIONS,))
        self.targets[0] = CLASSES + 1
        self.calls = 0
        trained_weights = [weight for weight in self.module.parameters() if weight.requires_grad]
        self.head = Head(self.parts, (self.rows, *trained_weights), cut)

    def parts(self, hidden):
        self.calls += 1
        return self.module(hidden), hidden @ self.rows.T

    def plain(self, weight: float, z_loss: float):
        logits = torch.cat(self.parts(self.hidden), dim=-1)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        nll = F.cross_entropy(logits, self.targets, reduction="sum")
        loss = weight * (nll + z_loss * logits.logsumexp(-1).square().sum())
        return loss, nll, (logits.argmax(-1) == self.targets).sum()

    def gradients(self):
        found = [t.grad for t in (self.hidden, self.rows, *self.module.parameters())]
        for tensor in (self.hidden, self.rows, *self.module.parameters()):
            tensor.grad = None
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("trained, cut", [(True, False), (False, False), (True, True), (False, True)])
@pytest.mark.parametrize("pieces", [1, 4, 40])
def test_loss_and_gradients_equal_those_of_all_logits_at_once(dtype, trained, cut, pieces):
    subject = Subject(dtype, trained, cut)
    ours = score(subject.head, subject.hidden, subject.targets, pieces, weight=0.7, z_loss=0.3)
    (ours.loss / 5).backward()
    own = subject.gradients()
    loss, nll, correct = subject.plain(0.7, 0.3)
    (loss / 5).backward()
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close((ours.loss, ours.nll), (loss, nll), rtol=exact, atol=exact)
    assert int(ours.correct) == int(correct)
    for mine, theirs in zip(own, subject.gradients(), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=exact, atol=exact)


def test_blocks_of_a_piece_change_nothing(monkeypatch):
    whole = score((subject := Subject()).head, subject.hidden, subject.targets, 1, z_loss=0.1)
    whole.loss.backward()
    gradients = subject.gradients()
    monkeypatch.setattr(heads, "_BLOCK", 3 * (CLASSES + 2))
    blocks = score(subject.head, subject.hidden, subject.targets, 1, z_loss=0.1)
    blocks.loss.backward()
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(subject.gradients(), gradients)


def test_a_head_under_autocast_is_scored_in_float32():
    subject = Subject()
    with torch.autocast("cpu", torch.bfloat16):
        ours = score(subject.head, subject.hidden, subject.targets, 3)
        loss, nll, _ = subject.plain(1.0, 0.0)
    assert ours.loss.dtype == torch.float32
    torch.testing.assert_close((ours.loss, ours.nll), (loss, nll), rtol=1e-5, atol=1e-4)
    ours.loss.backward()
    own = subject.gradients()
    loss.backward()
    torch.testing.assert_close(own, subject.gradients(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("cut, times", [(False, 5), (True, 10)])
def test_the_head_is_called_as_often_as_said_whatever_is_scored(cut, times):
    # Sharded among ranks, it would wait for ever for a rank that calls it less often; there the backward pass counts.
    for count in (0, 3, POSITIONS):
        subject = Subject(cut=cut)
        score(subject.head, subject.hidden[:count], subject.targets[:count], 5).loss.backward()
        assert subject.calls == times
        assert all(gradient is not None for gradient in subject.gradients())


@pytest.mark.parametrize("cut", [False, True])
def test_rows_learn_beside_a_frozen_head_and_hidden_states_without_a_gradient(cut):
    subject = Subject(trained=False, cut=cut)
    subject.hidden.requires_grad_(False)
    score(subject.head, subject.hidden, subject.targets, 3).loss.backward()
    own = subject.rows.grad.clone()
    subject.rows.grad = None
    subject.plain(1.0, 0.0)[0].backward()
    torch.testing.assert_close(own, subject.rows.grad)


def test_nothing_is_differentiated_where_nobody_asks():
    subject = Subject()
    with torch.no_grad():
        ours = score(subject.head, subject.hidden, subject.targets, 4, weight=2.0, z_loss=0.1)
    assert not ours.loss.requires_grad
    torch.testing.assert_close((ours.loss, ours.nll, ours.correct), subject.plain(2.0, 0.1))


@pytest.mark.parametrize("targets", ["first", "last"])
def test_of_equal_logits_the_first_counts_as_the_likeliest(targets):
    subject = Subject()
    nn.init.zeros_(subject.module.weight)
    nn.init.zeros_(subject.module.bias)
    subject.rows.data.zero_()
    subject.targets.fill_(0 if targets == "first" else CLASSES + 1)
    correct = score(subject.head, subject.hidden, subject.targets, 2).correct
    assert int(correct) == (POSITIONS if targets == "first" else 0)


class Largest(TorchDispatchMode):
    """Remembers the elements of the largest tensor that is made inside."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *made])
        return out


def tiny_model(family: str = "qwen2-tied", **sizes) -> LarpMllmForCausalLM:
    torch.manual_seed(0)
    config = FAMILIES[family]()
    for name, value in sizes.items():
        setattr(config, name, value)
    return LarpMllmForCausalLM.from_base(AutoModelForCausalLM.from_config(config), 0, torch.randn(16, 4), 4)


def mixed_batch(model: LarpMllmForCausalLM, rows: int = 2, length: int = 24):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.vocabulary.size, (rows, length), generator=generator)
    return ids, ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("cut", [True, False])
def test_no_more_logits_are_made_than_a_chunk_holds(trained, cut):
    # The logits of all 2 x 50 positions would be the largest tensor by far, the head's weights the largest otherwise.
    model = tiny_model(vocab_size=1000)
    model.base.requires_grad_(trained)
    if cut:
        model.base.get_output_embeddings().weight.ds_id = 0
    ids, labels = mixed_batch(model, length=50)
    with Largest() as largest:
        model(ids, labels=labels, head_chunk=8).loss.backward()
    assert largest.elements == model.base.get_output_embeddings().weight.numel()
    with Largest() as largest:
        model(ids, labels=labels, head_chunk=1024).loss.backward()
    assert largest.elements > 50 * 1000


@pytest.mark.parametrize("family", ["qwen2-tied", "qwen2-untied"])
@pytest.mark.parametrize("cut", [True, False])
def test_chunks_change_neither_loss_nor_gradients_of_a_model(family, cut):
    found = []
    for chunk in (1024, 5):
        model = tiny_model(family).double()
        if cut and chunk == 5:
            model.base.get_output_embeddings().weight.ds_id = 0
        ids, labels = mixed_batch(model)
        out = model(ids, labels=labels, z_loss=1e-2, text_weight=0.5, head_chunk=chunk)
        out.loss.backward()
        found.append((out.loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_z_loss_is_added_over_the_targets_of_both_kinds():
    model = tiny_model()
    ids, labels = mixed_batch(model)
    logits, targets, first = model(ids).logits[:, :-1], labels[:, 1:], model.vocabulary.first_code
    text = logits[..., :first].logsumexp(-1).square()[(targets >= 0) & (targets < first)].sum()
    codes = logits[..., first:].logsumexp(-1).square()[targets >= first].sum()
    without, with_it = (model(ids, labels=labels, num_items_in_batch=7.0, z_loss=z) for z in (0.0, 0.1))
    torch.testing.assert_close(with_it.loss - without.loss, 0.1 * (text + codes) / 7)
    assert torch.equal(with_it.text_nll, without.text_nll)
    assert torch.equal(with_it.video_nll, without.video_nll)
    half = [model(ids, labels=labels, num_items_in_batch=7.0, z_loss=z, text_weight=0.5).loss for z in (0.0, 0.1)]
    torch.testing.assert_close(half[1] - half[0], 0.1 * (0.5 * text + codes) / 7)
