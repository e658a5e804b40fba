"""The sampler: cached decoding against the plain forward pass, reproducible draws, honest distributions."""

from larp.generator import GeneratorConfig, LarpGenerator
from larp.sampling import KeyValueCache, generate, guide, row_uniforms, sample_logits

import pytest
import torch


def drawn(task="class") -> LarpGenerator:
    torch.manual_seed(1)
    model = LarpGenerator(
        GeneratorConfig(
            task, num_tokens=7, codebook_size=20, depth=2, heads=2, width=16, num_classes=3, ffn_multiple=16
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def condition_of(model, rows):
    if model.config.task == "class":
        return torch.arange(rows) % 3
    return model.frame_condition(torch.randint(20, (rows, 7), generator=torch.Generator().manual_seed(5)))


@torch.no_grad()
@pytest.mark.parametrize("task", ["class", "frame-prediction"])
def test_cached_decoding_gives_the_logits_of_the_plain_forward_at_every_step(task):
    model = drawn(task)
    condition, codes = condition_of(model, 3), torch.randint(20, (3, 7))
    plain = model(codes, condition)
    cache = KeyValueCache.for_generator(model, rows=3)
    steps = [model.prefill(condition, cache)]
    assert cache.filled == model.config.condition_length
    steps += [model.decode_one(codes[:, index], cache) for index in range(6)]
    assert cache.filled == cache.keys.shape[3] == model.config.positions, "preallocated to what is needed, and no more"
    for index, logits in enumerate(steps):
        torch.testing.assert_close(logits, plain[:, index], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="the clip is complete"):
        model.decode_one(codes[:, 6], cache)
    with pytest.raises(ValueError, match="allocate a longer one"):
        cache.append(0, *torch.zeros(2, 3, 2, 1, 8))


@torch.no_grad()
def test_guided_sampling_agrees_with_a_naive_loop():
    model = drawn()
    labels, nobody = torch.tensor([0, 2]), torch.tensor([3, 3])
    uniforms = row_uniforms(9, 0, 2, 7)
    codes = torch.zeros(2, 7, dtype=torch.int64)
    for index in range(7):
        conditional, unconditional = model(codes, labels)[:, index], model(codes, nobody)[:, index]
        logits = unconditional + 1.7 * (conditional - unconditional)
        codes[:, index] = sample_logits(logits, 0.9, 10, 0.8, uniforms[:, index])
    assert torch.equal(generate(model, labels, guidance=1.7, temperature=0.9, top_k=10, top_p=0.8, seed=9), codes)
    assert not torch.equal(generate(model, labels, temperature=0.9, top_k=10, top_p=0.8, seed=9), codes)


def test_a_row_depends_on_seed_and_index_only():
    model = drawn()
    labels = condition_of(model, 5)
    whole = generate(model, labels, guidance=1.5, seed=4)
    parts = [generate(model, labels[i : i + 2], guidance=1.5, seed=4, first_row=i) for i in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, generate(model, labels, guidance=1.5, seed=5))
    assert len({tuple(row) for row in generate(model, torch.zeros(5, dtype=torch.int64)).tolist()}) > 1


def test_generation_leaves_the_model_as_it_was():
    model = drawn().train()
    first, second = (generate(model, torch.tensor([1]), seed=2) for _ in range(2))
    assert model.training and torch.equal(first, second), "dropout is off while sampling"
    assert model.tok_embeddings(first).requires_grad


def test_frequencies_follow_the_softmax():
    logits = torch.randn(8, generator=torch.Generator().manual_seed(0))
    uniform = (torch.arange(20000) + 0.5) / 20000
    for temperature in (1.0, 0.5):
        ids = sample_logits(logits.expand(20000, 8), temperature=temperature, uniform=uniform)
        frequencies = torch.bincount(ids, minlength=8) / 20000
        torch.testing.assert_close(frequencies, (logits / temperature).softmax(0), atol=2e-4, rtol=0)


def test_top_k_and_top_p():
    probabilities = torch.tensor([0.05, 0.5, 0.15, 0.3])
    logits = probabilities.log().expand(1000, 4)
    uniform = torch.linspace(0, 1, 1001)[:1000]

    def kept(**options):
        return set(sample_logits(logits, uniform=uniform, **options).tolist())

    assert kept() == {0, 1, 2, 3}
    assert kept(top_k=2) == {1, 3} and kept(top_k=1) == {1} and kept(top_k=9) == {0, 1, 2, 3}
    assert kept(top_p=0.5) == {1} and kept(top_p=0.6) == {1, 3} and kept(top_p=0.01) == {1}
    assert kept(top_k=3, top_p=0.9) == {1, 3, 2}
    assert kept(temperature=0) == {1}


def test_excluded_ids_are_never_drawn_even_at_the_edges():
    logits = torch.full((2, 6), -torch.inf)
    logits[:, 2:4] = torch.tensor([0.3, 1.7])
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample_logits(logits, uniform=edges).tolist() == [2, 3]


def test_guide_mixes_the_two_halves():
    mixed = guide(torch.tensor([[1.0, 3.0], [0.0, 1.0]]), 3.0)
    assert mixed.tolist() == [[3.0, 7.0]]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": "1"}, "temperature is 1; it must be a finite number"),
        ({"guidance": -0.5}, "guidance is -0.5"),
        ({"guidance": float("inf")}, "guidance is inf; it must be a finite number"),
        ({"guidance": float("nan")}, "guidance is nan; it must be a finite number"),
        ({"guidance": None}, "guidance is None"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        generate(drawn(), torch.tensor([0]), **options)


def test_bad_conditions():
    with pytest.raises(ValueError, match=r"labels run from 1 to 4; this generator knows 0 to 3"):
        generate(drawn(), torch.tensor([1, 4]))
    with pytest.raises(ValueError, match=r"no rows"):
        generate(drawn(), torch.empty(0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"use guidance 1\.0"):
        model = drawn("frame-prediction")
        generate(model, condition_of(model, 1), guidance=2.0)
    with pytest.raises(ValueError, match="needs `uniform`"):
        sample_logits(torch.zeros(1, 4))
