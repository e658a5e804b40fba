"""transformers' own generate with our logits processors gives the ids of larp_mllm, greedily and by seed."""

import re

import larp_mllm
from larp_mllm.generation import logits_processors as module
from larp_mllm.generation.decode import decode_answer, decode_text
from larp_mllm.generation.logits_processors import SpanGuidance, SpanRules, logits_processors
from larp_mllm.generation.sampling import TextSampling, VideoSampling
from tests.larp_mllm.tiny import favour_videos

import pytest
import torch

PROMPTS = ["a red circle", "surfing", "a person that is surfing slowly with a <|video_start|> in the text", ""]
SMALL = larp_mllm.Vocabulary(text_size=10, codebook_size=4, tokens_per_video=2)


def left_padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def theirs(mllm, rows, count, processors, **options) -> list[list[int]]:
    """The ids that transformers' generate gives after each row."""
    inputs = left_padded(rows)
    options = {"eos_token_id": None, "pad_token_id": 0} | options
    generated = mllm.model.generate(
        **inputs, max_new_tokens=count, do_sample=False, logits_processor=processors, **options
    )
    return generated[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_videos_are_those_of_transformers_generate(mllm, scale, temperature):
    layout, v = mllm.processor.layout, mllm.model.vocabulary
    sampling = VideoSampling(guidance_scale=scale, temperature=temperature, top_k=9, top_p=0.95, seed=5)
    ours = mllm.generate(PROMPTS, sampling=sampling)
    rows = [layout.prompt(mllm.processor.encode_text(text)) for text in PROMPTS]
    if scale != 1.0:
        rows += [layout.prompt([])] * len(rows)
    processors = logits_processors(v, sampling, prompt_length=max(map(len, rows)))
    generated = theirs(mllm, rows, 5, processors)
    for row, video in enumerate(ours):
        assert generated[row] == [*(v.code_to_id(code) for code in video.codes), v.video_end]
    assert generated[len(PROMPTS) :] == (generated[: len(PROMPTS)] if scale != 1.0 else [])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_captions_are_those_of_transformers_generate(mllm, temperature):
    layout, model = mllm.processor.layout, mllm.model
    text = TextSampling(temperature=temperature, top_k=40, max_new_tokens=9, seed=2)
    rows = [layout.question([code] * 4) for code in (3, 7)]
    processors = logits_processors(
        model.vocabulary, VideoSampling(guidance_scale=1.0), text, prompt_length=6, max_videos=0
    )
    generated = theirs(mllm, rows, 9, processors, eos_token_id=layout.eos)
    for ours, row in zip(decode_text(model, rows, text, [layout.eos]), generated, strict=True):
        assert row[: len(ours)] == ours and set(row[len(ours) :]) <= {layout.eos}


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_answers_of_text_and_videos_are_those_of_transformers_generate(mllm, monkeypatch, scale):
    model, layout = mllm.model, mllm.processor.layout
    v, prompt = model.vocabulary, layout.prompt(mllm.processor.encode_text("surfing"))[:-1]
    video, text = VideoSampling(guidance_scale=scale, seed=1), TextSampling(temperature=1.0, max_new_tokens=12, seed=4)
    favour_videos(mllm, monkeypatch)
    ours = list(decode_answer(model, prompt, layout.prompt([]), video, text, [], max_videos=2))
    kinds = [kind for kind, _ in v.split(ours)]
    assert kinds.count("video") == 2 and kinds.count("text") >= 2
    if scale == 1.0:  # theirs guides a second span against a row that holds the text before it
        processors = logits_processors(v, video, text, prompt_length=len(prompt), max_videos=2)
        assert theirs(mllm, [prompt], len(ours), processors) == [ours]


def test_the_example_of_the_docstring_gives_the_same_video(qwen):
    example = re.search(r"( +layout, sampling = .*?mllm\.generate.*?\n)", module.logits_processors.__doc__, re.DOTALL)
    code = "\n".join(line.removeprefix(" " * 8) for line in example[0].splitlines())
    names = vars(module) | {"mllm": qwen}
    exec(code, names)
    (video,) = qwen.generate(["a person surfing"], sampling=VideoSampling(guidance_scale=2.0, seed=3))
    assert names["codes"].tolist() == [list(video.codes)]
    assert (names["frames"][0] == video.frames).all()


def test_first_row_selects_the_random_numbers(qwen):
    layout, v = qwen.processor.layout, qwen.model.vocabulary
    row = layout.prompt(qwen.processor.encode_text("surfing"))
    ours = qwen.generate(["surfing"], 3, VideoSampling(guidance_scale=1.0, seed=7))
    processors = logits_processors(v, VideoSampling(guidance_scale=1.0, seed=7), prompt_length=len(row), first_row=2)
    (generated,) = theirs(qwen, [row], 4, processors)
    assert [v.id_to_code(i) for i in generated] == list(ours[2].codes) != list(ours[0].codes)


def allowed(rules: SpanRules, ids: list[int]) -> list[int]:
    return torch.isfinite(rules(torch.tensor([ids]), torch.zeros(1, SMALL.size))[0]).nonzero()[:, 0].tolist()


def test_rules_allow_exactly_n_codes_and_none_outside():
    v, rules = SMALL, SpanRules(SMALL)
    text, codes = list(range(10)), list(range(12, 16))
    assert allowed(rules, [3]) == [*text, v.video_start]
    assert allowed(rules, [3, v.video_start]) == codes
    assert allowed(rules, [3, v.video_start, 12]) == codes
    assert allowed(rules, [3, v.video_start, 12, 13]) == [v.video_end]
    assert allowed(rules, [*v.span([0, 1])]) == [*text, v.video_start]


def test_rules_count_the_videos_after_the_prompt():
    text, span = list(range(10)), SMALL.span([0, 1])
    assert allowed(SpanRules(SMALL, max_videos=0), [3]) == text
    rules = SpanRules(SMALL, max_videos=2, prompt_length=5)
    assert SMALL.video_start in allowed(rules, [*span, 3, *span])
    assert SMALL.video_start not in allowed(rules, [*span, 3, *span, *span])


def test_guidance_acts_only_inside_spans():
    guidance, scores = SpanGuidance(SMALL, 3.0), torch.randn(2, SMALL.size)
    inside = guidance(torch.tensor([[1, SMALL.video_start], [0, SMALL.video_start]]), scores)
    assert torch.equal(inside[0], inside[1])
    torch.testing.assert_close(inside[0, 12:], scores[1, 12:] + 3 * (scores[0, 12:] - scores[1, 12:]))
    outside = guidance(torch.tensor([[1, 2], [0, 2]]), scores)
    assert torch.equal(outside, scores[[0, 0]])
    with pytest.raises(ValueError, match="an even number of rows, got 3: add an unconditional row"):
        guidance(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, SMALL.size))
