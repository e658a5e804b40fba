"""Sampling: guidance against a naive loop, reproducibility, distributions, invalid options."""

from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.sampling.guidance import apply_guidance, guidance_scales
from larp.sampling.options import GuidedSampling, SamplingOptions
from larp.sampling.sample import generate, row_uniforms, sample_logits

import pytest
import torch


def random_generator(task="class", **fields) -> LarpGenerator:
    torch.manual_seed(1)
    shape = dict(num_tokens=7, codebook_size=20, depth=2, heads=2, width=16, num_classes=3, ffn_multiple=16)
    model = LarpGenerator(GeneratorConfig(task, **shape | fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def condition_of(model, rows):
    if model.config.task == "class":
        return torch.arange(rows) % 3
    return model.frame_condition(torch.randint(20, (rows, 7), generator=torch.Generator().manual_seed(5)))


@torch.no_grad()
@pytest.mark.parametrize("task", ["class", "frame-prediction"])
def test_guided_sampling_agrees_with_a_naive_loop(task):
    model = random_generator(task, null_condition=task != "class")
    given = condition_of(model, 2)
    nothing = torch.tensor([3, 3]) if task == "class" else torch.tensor([[21] * 7 + [20]] * 2)
    scales = [1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 1.0]
    options = dict(temperature=0.9, top_k=15, top_p=0.9, min_p=0.01)
    uniforms = row_uniforms(9, 0, 2, 7)
    codes = torch.zeros(2, 7, dtype=torch.int64)
    for index in range(7):
        conditional, unconditional = model(codes, given)[:, index], model(codes, nothing)[:, index]
        logits = unconditional + scales[index] * (conditional - unconditional)
        codes[:, index] = sample_logits(logits, SamplingOptions(**options), uniforms[:, index])
    ramp = dict(guidance_scale=1.5, guidance_final=3.0, guidance_start=0.2, guidance_stop=0.85)
    assert torch.equal(generate(model, given, GuidedSampling(**ramp, **options), seed=9), codes)
    assert not torch.equal(generate(model, given, GuidedSampling(guidance_scale=1.5, **options), seed=9), codes)
    assert not torch.equal(generate(model, given, GuidedSampling(**options), seed=9), codes)


def scales(count, scale, **ramp):
    options = {f"guidance_{name}": value for name, value in ramp.items()}
    return guidance_scales(GuidedSampling(guidance_scale=scale, **options), count).tolist()


def test_guidance_ramps_and_is_off_outside_its_interval():
    assert scales(4, 2.0) == [2.0] * 4
    assert scales(4, 1.0, final=4.0) == [1.0, 2.0, 3.0, 4.0]
    assert scales(4, 3.0, final=2.0, start=0.25, stop=0.75) == [1.0, 3.0, 2.0, 1.0]
    assert scales(10, 3.0, start=0.7) == [1.0] * 7 + [3.0] * 3
    assert scales(4, 3.0, start=0.5, stop=0.51) == [1.0, 1.0, 3.0, 1.0]
    assert scales(4, 3.0, final=2.0, start=0.5, stop=0.51) == [1.0, 1.0, 2.0, 1.0]


def test_guidance_of_no_code_is_an_error():
    with pytest.raises(ValueError, match=r"from 0.501 to 0.502, which holds none of a clip's 10 codes: move start"):
        scales(10, 2.0, start=0.501, stop=0.502)
    with pytest.raises(ValueError, match="none of a clip's 7 codes"):
        generate(random_generator(), torch.tensor([0]), GuidedSampling(guidance_scale=2.0, guidance_start=0.9))


def test_a_row_depends_on_seed_and_index_only():
    model = random_generator()
    labels = condition_of(model, 5)
    whole = generate(model, labels, GuidedSampling(guidance_scale=1.5), seed=4)
    parts = [
        generate(model, labels[i : i + 2], GuidedSampling(guidance_scale=1.5), seed=4, first_row=i) for i in (0, 2, 4)
    ]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, generate(model, labels, GuidedSampling(guidance_scale=1.5), seed=5))
    assert len({tuple(row) for row in generate(model, torch.zeros(5, dtype=torch.int64)).tolist()}) > 1


def test_a_batch_may_have_several_classes():
    model = random_generator()
    mixed = generate(model, torch.tensor([0, 2, 0]), GuidedSampling(guidance_scale=2.0), seed=1)
    alone = generate(model, torch.tensor([2]), GuidedSampling(guidance_scale=2.0), seed=1, first_row=1)
    assert torch.equal(mixed[1:2], alone) and not torch.equal(mixed[0], mixed[2])


def test_generation_does_not_modify_the_model():
    model = random_generator().train()
    first, second = (generate(model, torch.tensor([1]), seed=2) for _ in range(2))
    assert model.training and torch.equal(first, second), "dropout is off while sampling"
    assert torch.equal(first, generate(model.eval(), torch.tensor([1]), seed=2))
    assert model.tok_embeddings(first).requires_grad


def test_frequencies_follow_the_softmax():
    logits = torch.randn(8, generator=torch.Generator().manual_seed(0))
    uniform = (torch.arange(20000) + 0.5) / 20000
    for temperature in (1.0, 0.5):
        ids = sample_logits(logits.expand(20000, 8), SamplingOptions(temperature=temperature), uniform=uniform)
        frequencies = torch.bincount(ids, minlength=8) / 20000
        torch.testing.assert_close(frequencies, (logits / temperature).softmax(0), atol=2e-4, rtol=0)


def test_top_k_top_p_and_min_p():
    probabilities = torch.tensor([0.05, 0.5, 0.15, 0.3])
    logits = probabilities.log().expand(1000, 4)
    uniform = torch.linspace(0, 1, 1001)[:1000]

    def kept(**options):
        return set(sample_logits(logits, SamplingOptions(**options), uniform).tolist())

    assert kept() == {0, 1, 2, 3}
    assert kept(top_k=2) == {1, 3} and kept(top_k=1) == {1} and kept(top_k=9) == {0, 1, 2, 3}
    assert kept(top_p=0.5) == {1} and kept(top_p=0.6) == {1, 3} and kept(top_p=0.01) == {1}
    assert kept(top_k=3, top_p=0.9) == {1, 3, 2}
    assert kept(min_p=0.2) == {1, 3, 2} and kept(min_p=0.5) == {1, 3} and kept(min_p=1.0) == {1}
    assert kept(top_k=3, min_p=0.5) == {1, 3} and kept(top_p=0.5, min_p=0.1) == {1}
    assert kept(temperature=0) == {1}


def test_top_k_keeps_exactly_k_of_equal_logits():
    uniform = torch.linspace(0, 1, 1001)[:1000]
    for logits, kept in (
        ([0.0, 0.0, 0.0, 0.0], {0, 1}),
        ([0.0, 1.0, 2.0, 1.0], {1, 2}),
        ([2.0, 1.0, 2.0, 2.0], {0, 2}),
    ):
        rows = torch.tensor(logits).expand(1000, 4)
        assert set(sample_logits(rows, SamplingOptions(top_k=2), uniform=uniform).tolist()) == kept


def test_extreme_options_sample_ids_in_range():
    logits = 100 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    uniform = torch.tensor([0.0, 0.4, 0.9, 1 - 2**-53], dtype=torch.float64)
    for options in ({"temperature": 1e-4}, {"top_p": 1e-6}):
        assert torch.equal(sample_logits(logits, SamplingOptions(**options), uniform), logits.argmax(-1))
    assert sample_logits(logits, SamplingOptions(temperature=1e6), uniform).max() < 50
    assert sample_logits(logits.fill_(torch.nan), uniform=uniform).max() < 50


def test_seeds_of_more_than_32_bits_are_distinct():
    seeds = [1, 1 << 32, (1 << 32) + 1, (5 << 32) + 1, -1, (1 << 32) - 1, (1 << 63) + 1]
    assert len({row_uniforms(seed, 0, 1, 3).numpy().tobytes() for seed in seeds}) == len(seeds)
    uniforms = row_uniforms(7, 2, 1, 3)[0]
    mixed = (7 * 0x9E3779B97F4A7C15 + 3 * 0xD1342543DE82EF95) % (1 << 63)
    assert torch.equal(uniforms, torch.rand(3, generator=torch.Generator().manual_seed(mixed), dtype=torch.float64))


def test_excluded_ids_are_never_sampled():
    logits = torch.full((2, 6), -torch.inf)
    logits[:, 2:4] = torch.tensor([0.3, 1.7])
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample_logits(logits, uniform=edges).tolist() == [2, 3]


def test_apply_guidance():
    mixed = apply_guidance(torch.tensor([[1.0, 3.0], [0.0, 1.0]]), 3.0)
    assert mixed.tolist() == [[3.0, 7.0]]
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(apply_guidance(logits, 1.0), logits[:1]), "a scale of 1 is no guidance, to the last bit"


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
        ({"temperature": "1"}, "temperature is '1'; it must be a finite number"),
        ({"temperature": True}, "temperature is True"),
        ({"top_k": True}, "top_k is True"),
        ({"min_p": 1.5}, "min_p is 1.5; it must lie in"),
        ({"min_p": None}, "min_p is None"),
        ({"guidance_scale": -0.5}, "guidance_scale is -0.5"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf; it must be a finite number"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; it must be a finite number"),
        ({"guidance_scale": None}, "guidance_scale is None"),
        ({"temperature": 1e-39}, r"temperature is 1e-39; it must be .* 0 \(always the likeliest\) or 0.0001 to 1e\+06"),
        ({"temperature": 1e39}, r"temperature is 1e\+39"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"top_p": 1e-50}, r"top_p is 1e-50; it must lie in \[1e-06, 1\]"),
        ({"guidance_scale": 3e38}, r"guidance_scale is 3e\+38; it must be a finite number from 0 to 1000"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        GuidedSampling(**options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"weights": "fast"}, "weights is 'fast'; it must be 'auto', 'plain', 'packed' or 'fused'"),
        ({"weights": "fused"}, "'fused' needs a GPU, and these are on cpu: use 'auto'"),
        ({"weights": "packed", "dtype": torch.float64}, "packed' needs float32 or bfloat16.*not torch.float64"),
    ],
)
def test_bad_weights(options, words):
    with pytest.raises(ValueError, match=words):
        generate(random_generator(), torch.tensor([0]), **options)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"guidance_final": -1.0}, "guidance_final is -1.0"),
        ({"guidance_final": 1e39}, r"guidance_final is 1e\+39; it must be a finite number from 0 to 1000"),
        ({"guidance_start": 0.5, "guidance_stop": 0.5}, "guidance runs from 0.5 to 0.5"),
        ({"guidance_stop": 1.5}, "0 <= start < stop <= 1"),
    ],
)
def test_bad_guidance(fields, words):
    with pytest.raises(ValueError, match=words):
        GuidedSampling(guidance_scale=2.0, **fields)


def test_bad_conditions():
    with pytest.raises(ValueError, match=r"labels run from 1 to 4; this generator has 0 to 3"):
        generate(random_generator(), torch.tensor([1, 4]))
    with pytest.raises(
        ValueError, match=r"condition is torch.float32; classes and codes are whole numbers: give int64"
    ):
        generate(random_generator(), torch.zeros(1))
    with pytest.raises(ValueError, match=r"no rows"):
        generate(random_generator(), torch.empty(0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"use guidance_scale 1\.0"):
        model = random_generator("frame-prediction")
        generate(model, condition_of(model, 1), GuidedSampling(guidance_scale=2.0))
    with pytest.raises(ValueError, match="needs `uniform`"):
        sample_logits(torch.zeros(1, 4))
