"""larp_mllm.metrics.scores: bits, intervals, and classes named in captions."""

import math

from larp_mllm.metrics.scores import caption_figures, class_in_caption, code_bits, frequency_bits
from tests.larp_mllm.tiny import K, N

import pytest
import torch

CLASSES = ("PlayingPiano", "PlayingViolin", "Surfing", "Walking", "WalkingWithDog")


@pytest.fixture
def uniform(qwen):
    """The tiny model with equal logits for all codes during the test."""
    output = qwen.model.adapter.code_output
    before = {name: tensor.clone() for name, tensor in output.state_dict().items()}
    with torch.no_grad():
        for parameter in output.parameters():
            parameter.zero_()
    yield qwen
    output.load_state_dict(before)


def test_a_uniform_model_needs_log2_k_bits_for_every_code(uniform):
    layout = uniform.processor.layout
    codes = torch.randint(K, (3, N))
    prompts = [layout.prompt([]), layout.prompt([5, 6, 7]), layout.continuation([5], [0] * N)]
    assert code_bits(uniform.model, prompts, codes).tolist() == pytest.approx([math.log2(K)] * 3)


def test_bits_equal_the_cross_entropy_of_the_codes(mllm):
    """That of each clip alone, among codes, equals its bits in a padded batch with other prompts."""
    vocabulary, layout = mllm.model.vocabulary, mllm.processor.layout
    texts = ["", "a person surfing", "a blue square moving up", "x"]
    prompts = [layout.prompt(mllm.processor.encode_text(text)) for text in texts]
    prompts.append(layout.continuation(mllm.processor.encode_text("a"), [3, 1, 2, 0]))
    codes = torch.randint(K, (len(prompts), N))
    bits = code_bits(mllm.model, prompts, codes.to(torch.int16), batch_size=2)
    assert bits.std() > 1e-4
    for prompt, row, found in zip(prompts, codes.tolist(), bits.tolist(), strict=True):
        ids = torch.tensor([[*prompt, *vocabulary.span(row)[1:]]])
        with torch.no_grad():
            logits = mllm.model(input_ids=ids).logits[0, len(prompt) - 1 : -2, vocabulary.first_code :]
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(row))
        assert found == pytest.approx(nll.item() / math.log(2), rel=1e-5)


def test_unequal_numbers_are_refused(qwen):
    prompt = qwen.processor.layout.prompt([])
    with pytest.raises(ValueError, match="2 prompts for the codes of 1 clips"):
        code_bits(qwen.model, [prompt, prompt], torch.zeros(1, N, dtype=torch.int64))
    with pytest.raises(ValueError, match="1024 positions"):
        code_bits(qwen.model, [[0] * 1021 + prompt], torch.zeros(1, N, dtype=torch.int64))


def test_frequency_bits_are_the_entropy():
    train = torch.tensor([[0, 0, 0, 1]] * 100, dtype=torch.int16)
    figures = frequency_bits(train, torch.tensor([[0, 1], [0, 3]]), 4)
    assert figures["entropy"] == pytest.approx(0.75 * math.log2(4 / 3) + 0.25 * 2)
    costs = [-math.log2(count / 404) for count in (301, 101, 301, 1)]
    assert figures["held_out"] == pytest.approx(sum(costs) / 4)


@pytest.mark.parametrize(
    "caption, named",
    [
        ("surfing", "Surfing"),
        ("a video of a person playing violin", "PlayingViolin"),
        ("Someone is  Surfing.", "Surfing"),
        ("two men playing the old piano", "PlayingPiano"),
        ("a person walking", "Walking"),
        ("a man with a dog walking", "WalkingWithDog"),
        ("playing piano and violin", None),
        ("playing", None),
        ("windsurfing", None),
        ("", None),
    ],
)
def test_a_caption_names_a_class(caption, named):
    number = class_in_caption(caption, CLASSES)
    assert (None if number is None else CLASSES[number]) == named


def test_a_phrasing_takes_precedence_over_words():
    """A caption in a phrasing of one class may hold all words of another."""
    assert class_in_caption("dog walking", ("walking", "WalkingDog"), ("{}", "dog {}")) == 0


def test_figures_of_captions():
    captions = ["surfing", "a person surfing", "playing piano", "who knows", "walking"]
    figures = caption_figures(captions, [2, 2, 1, 1, 3], CLASSES, torch.arange(5))
    assert figures["accuracy"] == 0.6 and figures["num_clips"] == 5 and figures["unread"] == 1
    assert (figures["chance"], figures["most_frequent"]) == (0.2, 0.4)
    assert figures["by_class"] == {"PlayingViolin": 0, "Surfing": 1, "Walking": 1}
    assert figures["confusion"][1] == [1, 0, 0, 0, 0, 1] and figures["confusion"][2] == [0, 0, 2, 0, 0, 0]
    low, high = figures["interval_95"]
    assert (round(low, 2), round(high, 2)) == (0.23, 0.88)  # Wilson's for 3 of 5, from tables
    with pytest.raises(ValueError, match="1 captions for 2 videos"):
        caption_figures(["x"], [0, 1], CLASSES, torch.arange(2))
