"""The chunked loss: the values and gradients of all logits at once, in less memory."""

from larp_mllm.model import chunked_loss
from larp_mllm.model.chunked_loss import OutputHead, chunked_cross_entropy
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
    """A head with a bias and two further rows, hidden states and targets, from a fixed seed."""

    def __init__(self, dtype=torch.float32, trained: bool = True, sharded: bool = False):
        torch.manual_seed(0)
        self.module = nn.Linear(WIDTH, CLASSES, dtype=dtype).requires_grad_(trained)
        self.rows = torch.randn(2, WIDTH, dtype=dtype, requires_grad=True)
        self.hidden = torch.randn(POSITIONS, WIDTH, dtype=dtype, requires_grad=True)
        self.targets = torch.randint(0, CLASSES + 2, (POSITIONS,))
        self.targets[0] = CLASSES + 1
        self.calls = 0
        trained_weights = [weight for weight in self.module.parameters() if weight.requires_grad]
        self.head = OutputHead(self.project, (self.rows, *trained_weights), sharded)

    def project(self, hidden):
        self.calls += 1
        return self.module(hidden), hidden @ self.rows.T

    def reference(self, weight: float, z_loss: float):
        logits = torch.cat(self.project(self.hidden), dim=-1)
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
@pytest.mark.parametrize("trained, sharded", [(True, False), (False, False), (True, True), (False, True)])
@pytest.mark.parametrize("num_chunks", [1, 4, 40])
def test_loss_and_gradients_equal_those_of_all_logits_at_once(dtype, trained, sharded, num_chunks):
    subject = Subject(dtype, trained, sharded)
    ours = chunked_cross_entropy(subject.head, subject.hidden, subject.targets, num_chunks, weight=0.7, z_loss=0.3)
    (ours.loss / 5).backward()
    own = subject.gradients()
    loss, nll, correct = subject.reference(0.7, 0.3)
    (loss / 5).backward()
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close((ours.loss, ours.nll), (loss, nll), rtol=exact, atol=exact)
    assert int(ours.correct) == int(correct)
    for mine, theirs in zip(own, subject.gradients(), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=exact, atol=exact)


def test_blocks_of_a_chunk_change_nothing(monkeypatch):
    whole = chunked_cross_entropy((subject := Subject()).head, subject.hidden, subject.targets, 1, z_loss=0.1)
    whole.loss.backward()
    gradients = subject.gradients()
    monkeypatch.setattr(chunked_loss, "_BLOCK", 3 * (CLASSES + 2))
    blocks = chunked_cross_entropy(subject.head, subject.hidden, subject.targets, 1, z_loss=0.1)
    blocks.loss.backward()
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(subject.gradients(), gradients)


def test_the_loss_under_autocast_is_float32():
    subject = Subject()
    with torch.autocast("cpu", torch.bfloat16):
        ours = chunked_cross_entropy(subject.head, subject.hidden, subject.targets, 3)
        loss, nll, _ = subject.reference(1.0, 0.0)
    assert ours.loss.dtype == torch.float32
    torch.testing.assert_close((ours.loss, ours.nll), (loss, nll), rtol=1e-5, atol=1e-4)
    ours.loss.backward()
    own = subject.gradients()
    loss.backward()
    torch.testing.assert_close(own, subject.gradients(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("sharded, times", [(False, 5), (True, 10)])
def test_the_head_is_called_num_chunks_times_for_any_number_of_targets(sharded, times):
    # With ZeRO-3 all ranks must call the head equally often; the backward pass calls it again.
    for count in (0, 3, POSITIONS):
        subject = Subject(sharded=sharded)
        chunked_cross_entropy(subject.head, subject.hidden[:count], subject.targets[:count], 5).loss.backward()
        assert subject.calls == times
        assert all(gradient is not None for gradient in subject.gradients())


@pytest.mark.parametrize("sharded", [False, True])
def test_control_rows_get_gradients_with_a_frozen_head_and_hidden_states_without_gradients(sharded):
    subject = Subject(trained=False, sharded=sharded)
    subject.hidden.requires_grad_(False)
    chunked_cross_entropy(subject.head, subject.hidden, subject.targets, 3).loss.backward()
    own = subject.rows.grad.clone()
    subject.rows.grad = None
    subject.reference(1.0, 0.0)[0].backward()
    torch.testing.assert_close(own, subject.rows.grad)


def test_no_gradients_are_computed_under_no_grad():
    subject = Subject()
    with torch.no_grad():
        ours = chunked_cross_entropy(subject.head, subject.hidden, subject.targets, 4, weight=2.0, z_loss=0.1)
    assert not ours.loss.requires_grad
    torch.testing.assert_close((ours.loss, ours.nll, ours.correct), subject.reference(2.0, 0.1))


@pytest.mark.parametrize("targets", ["first", "last"])
def test_the_first_of_equal_logits_is_the_likeliest(targets):
    subject = Subject()
    nn.init.zeros_(subject.module.weight)
    nn.init.zeros_(subject.module.bias)
    subject.rows.data.zero_()
    subject.targets.fill_(0 if targets == "first" else CLASSES + 1)
    correct = chunked_cross_entropy(subject.head, subject.hidden, subject.targets, 2).correct
    assert int(correct) == (POSITIONS if targets == "first" else 0)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor created inside."""

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
@pytest.mark.parametrize("sharded", [True, False])
def test_logits_exist_for_one_chunk_at_a_time(trained, sharded):
    # The logits of all 2 x 50 positions would be the largest tensor; in chunks it is the head's weight.
    model = tiny_model(vocab_size=1000)
    model.base.requires_grad_(trained)
    if sharded:
        model.base.get_output_embeddings().weight.ds_id = 0
    ids, labels = mixed_batch(model, length=50)
    with Largest() as largest:
        model(ids, labels=labels, head_chunk=8).loss.backward()
    assert largest.elements == model.base.get_output_embeddings().weight.numel()
    with Largest() as largest:
        model(ids, labels=labels, head_chunk=1024).loss.backward()
    assert largest.elements > 50 * 1000


@pytest.mark.parametrize("family", ["qwen2-tied", "qwen2-untied"])
@pytest.mark.parametrize("sharded", [True, False])
def test_chunks_change_neither_loss_nor_gradients_of_a_model(family, sharded):
    found = []
    for chunk in (1024, 5):
        model = tiny_model(family).double()
        if sharded and chunk == 5:
            model.base.get_output_embeddings().weight.ds_id = 0
        ids, labels = mixed_batch(model)
        out = model(ids, labels=labels, z_loss=1e-2, text_weight=0.5, head_chunk=chunk)
        out.loss.backward()
        found.append((out.loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_z_loss_is_added_over_the_targets_of_both_kinds():
    model = tiny_model()
    ids = torch.tensor(
        [[5, 6, *model.vocabulary.span([1, 2, 3, 0]), 7, 8], [*model.vocabulary.span([3, 3, 1, 2]), 9, 5, 6, 7]]
    )
    labels = ids.masked_fill(ids == 6, -100)
    logits, targets, end = model(ids).logits[:, :-1], labels[:, 1:], model.vocabulary.video_end
    of_all = logits.logsumexp(-1).square()
    text, codes = of_all[(targets >= 0) & (targets < end)].sum(), of_all[targets >= end].sum()
    without, with_it = (model(ids, labels=labels, num_items_in_batch=7.0, z_loss=z) for z in (0.0, 0.1))
    torch.testing.assert_close(with_it.loss - without.loss, 0.1 * (text + codes) / 7)
    assert torch.equal(with_it.text_nll, without.text_nll)
    assert torch.equal(with_it.video_nll, without.video_nll)
    half = [model(ids, labels=labels, num_items_in_batch=7.0, z_loss=z, text_weight=0.5).loss for z in (0.0, 0.1)]
    torch.testing.assert_close(half[1] - half[0], 0.1 * (0.5 * text + codes) / 7)
