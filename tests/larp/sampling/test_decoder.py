"""Decoding gives the logits of `LarpGenerator.forward` with every implementation of the linear layers; rows are independent."""

from larp.kernels.packed_linear import PackedLinear, PlainLinear, choose_linear
from larp.kernels.threads import best_threads, threads
from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.sampling.decoder import CapturedSteps, Decoder
from larp.sampling.options import GuidedSampling
from larp.sampling.sample import generate

import pytest
import torch

packable = pytest.mark.skipif(not PackedLinear.supports(torch.zeros(1, 1)), reason="no oneDNN on this machine")


def random_generator(task="class", **fields) -> LarpGenerator:
    """Return a model with random weights, wide enough for the kernels of large models."""
    torch.manual_seed(1)
    shape = dict(num_tokens=9, codebook_size=40, depth=2, heads=2, width=64, num_classes=3, ffn_multiple=32)
    model = LarpGenerator(GeneratorConfig(task, **shape | fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def condition_of(model, rows):
    if model.config.task == "class":
        return torch.arange(rows) % 3
    codes = torch.randint(40, (rows, model.config.num_tokens), generator=torch.Generator().manual_seed(5))
    return model.frame_condition(codes)


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("weights", ["plain", pytest.param("packed", marks=packable)])
@pytest.mark.parametrize(
    ("task", "code_dim"), [("class", 0), ("frame-prediction", 0), ("class", 8), ("frame-prediction", 8)]
)
def test_every_step_gives_the_logits_of_the_plain_forward(task, code_dim, weights, stride):
    model = random_generator(task, code_dim=code_dim)
    if code_dim:
        model.take_codebook(torch.randn(40, code_dim))
        torch.nn.init.normal_(model.output.mlp[2].weight, std=0.2)
    condition, codes = condition_of(model, 3), torch.randint(40, (3, 9))
    plain = model(codes, condition)
    decoder = Decoder(model, 3, weights=weights, stride=stride)
    for _ in range(2):  # the second time with a used cache
        steps = [decoder.prefill(condition)]
        assert decoder.filled == model.config.condition_length
        steps += [decoder.decode_one(codes[:, index]) for index in range(8)]
        assert decoder.filled == model.config.positions
        for index, logits in enumerate(steps):
            torch.testing.assert_close(logits, plain[:, index], rtol=1e-5, atol=1e-5)
    assert decoder.cache.keys.shape[3] - model.config.positions < stride, "the cache has the required length"
    with pytest.raises(ValueError, match="the clip is complete"):
        decoder.decode_one(codes[:, 8])


@torch.no_grad()
def test_attention_reads_filled_positions_only():
    model = random_generator()
    decoder = Decoder(model, 1, stride=1)
    decoder.prefill(torch.tensor([0]))
    decoder.cache.keys[:, :, :, 2:].fill_(torch.nan)
    decoder.cache.values[:, :, :, 2:].fill_(torch.nan)
    assert decoder.decode_one(torch.tensor([4])).isfinite().all()


@torch.no_grad()
def test_the_cache_is_allocated_once():
    model = random_generator()
    decoder = Decoder(model, 2)
    pointers = decoder.cache.keys.data_ptr(), decoder.cache.values.data_ptr()
    codes = torch.zeros(2, 9, dtype=torch.int64)
    decoder.prefill(condition_of(model, 2))
    decoder.decode_n(codes, lambda logits, index: logits.argmax(-1))
    assert (decoder.cache.keys.data_ptr(), decoder.cache.values.data_ptr()) == pointers and (codes[:, 1:] > 0).any()


def test_changed_weights_are_used_by_the_next_generation():
    model = random_generator()
    label = torch.tensor([1])
    before = generate(model, label, seed=3)
    changes = [
        lambda: model.layers[1].feed_forward.w3.weight.data.mul_(-1),  # as an optimizer copies its master weights
        lambda: model.load_state_dict({name: -value for name, value in model.state_dict().items()}),
        lambda: torch.nn.init.normal_(model.output.weight),
    ]
    for change in changes:
        change()
        again = LarpGenerator(model.config)
        again.load_state_dict(model.state_dict())
        after = generate(model, label, seed=3)
        assert torch.equal(after, generate(again, label, seed=3)) and not torch.equal(after, before)
        before = after


@packable
@torch.no_grad()
@pytest.mark.parametrize("task", ["class", "frame-prediction"])
def test_packed_weights_give_a_row_the_same_bits_in_any_batch_and_with_any_threads(task):
    n = 40
    model = random_generator(task, depth=3, width=128, codebook_size=300, num_tokens=n)
    codes = torch.randint(300, (9, n), generator=torch.Generator().manual_seed(0))
    condition = condition_of(model, 9)

    def logits(rows: slice, count: int) -> torch.Tensor:
        with threads(count):
            decoder = Decoder(model, len(condition[rows]), weights="packed")
            steps = [decoder.prefill(condition[rows])]
            steps += [decoder.decode_one(codes[rows, index]) for index in range(n - 1)]
        return torch.stack(steps, dim=1)

    whole = logits(slice(None), 1)
    for rows in (slice(0, 1), slice(4, 6), slice(2, 9)):
        for count in (1, 2):
            assert torch.equal(logits(rows, count), whole[rows])


@pytest.mark.parametrize("task", ["class", "frame-prediction"])
def test_bfloat16_decodes_close_to_float32(task):
    model = random_generator(task)
    codes = torch.randint(40, (2, 9))
    condition = condition_of(model, 2)
    with torch.no_grad():
        float32, bfloat16 = (Decoder(model, 2, dtype=dtype) for dtype in (None, torch.bfloat16))
        pairs = [(decoder.prefill(condition), decoder.decode_one(codes[:, 0])) for decoder in (float32, bfloat16)]
    assert (float32.norm.dtype, bfloat16.norm.dtype) == (torch.float32, torch.bfloat16)
    for exact, rounded in zip(*pairs, strict=True):
        assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
        torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.05 * exact.abs().max().item())
    assert generate(model, condition, dtype=torch.bfloat16).shape == (2, 9)


def test_a_step_runs_once_before_it_is_captured_and_is_replayed_from_then_on(monkeypatch):
    """Without a GPU: a fake graph that records a call and repeats it when replayed."""
    ran, captured = [], []

    class Graph:
        def replay(self):
            self.recorded()

    class Capture:
        def __init__(self, graph, pool, capture_error_mode):
            captured.append(graph)

        def __enter__(self):
            self.before = list(ran)

        def __exit__(self, *_):
            span = ran.pop()
            assert ran == self.before
            captured[-1].recorded = lambda: ran.append(("replayed", span))

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    steps = CapturedSteps(ran.append)
    for span in (4, 4, 4, 8, 8):
        steps(span)
    assert ran == [4, ("replayed", 4), ("replayed", 4), 8, ("replayed", 8)] and len(captured) == 2


def test_a_step_needs_only_the_attended_length_from_the_host(monkeypatch):
    """A CUDA graph repeats the same call, which must decode the next code."""
    model = random_generator()
    with torch.no_grad():
        codes = torch.zeros(2, 9, dtype=torch.int64)
        decoder = Decoder(model, 2, stride=16)
        codes[:, 0] = decoder.prefill(condition_of(model, 2)).argmax(-1)
        spans = []
        step = decoder._step
        monkeypatch.setattr(decoder, "_step", lambda newest, span: spans.append(span) or step(newest, span))
        decoder.decode_n(codes, lambda logits, index: logits.argmax(-1))
    assert set(spans) == {16}
    assert torch.equal(codes, generate(model, condition_of(model, 2), GuidedSampling(temperature=0)))


def test_weights_are_packed_where_supported():
    weight = torch.randn(8, 4)
    assert choose_linear(weight.double()) is PlainLinear and choose_linear(weight, "plain") is PlainLinear
    assert choose_linear(weight) is (PackedLinear if PackedLinear.supports(weight) else PlainLinear)
    assert type(Decoder(random_generator(), 2, weights="plain").head) is PlainLinear
    assert type(Decoder(random_generator(), 2).blocks[0].qkv) is choose_linear(weight)


def test_threads_are_measured_and_restored(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for seconds, chosen in ((0.6, 2), (1.0, 1), (5.0, 1)):
            monkeypatch.setattr(
                "larp.kernels.threads._seconds", lambda run, count, many=seconds: 1.0 if count == 1 else many
            )
            assert best_threads(lambda: None) == chosen
        monkeypatch.undo()
        assert best_threads(lambda: None) in (1, 2) and torch.get_num_threads() == 2
        with pytest.raises(KeyError), threads(1):
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert best_threads(lambda: None) == 1
    finally:
        torch.set_num_threads(before)
