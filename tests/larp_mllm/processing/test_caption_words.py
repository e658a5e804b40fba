"""Which prompts are far from the captions that a model was trained on."""

from larp_mllm.processing.caption_words import content_words, describe_captions, is_far

import pytest

CAPTIONS = {"surfing", "a person surfing", "a video of someone playing the piano", "a red circle moving left"}


def test_what_is_recorded_of_captions():
    found = describe_captions(CAPTIONS)
    assert found["words"] == ["circle", "left", "moving", "piano", "playing", "red", "surfing"]
    assert found["examples"][0] == "surfing" and set(found["examples"]) == CAPTIONS
    assert found["examples"][1:3] == ["a red circle moving left", "a video of someone playing the piano"]
    many = describe_captions({f"word{chr(97 + k % 26)}{chr(97 + k // 26)}x number {k}" for k in range(600)})
    assert len(many["examples"]) == 10 and describe_captions([]) == {"words": [], "examples": []}


@pytest.mark.parametrize(
    ("prompt", "far"),
    [
        ("a person surfing", False),
        ("A SURFER on a wave", False),
        ("a pianist", False),
        ("a dog in the water", True),
        ("a spaceship landing", True),
        ("show me a video", False),
        ("", False),
        ("12", False),
    ],
)
def test_prompts_without_a_known_word_are_far(prompt, far):
    assert is_far(prompt, describe_captions(CAPTIONS)["words"]) == far
    assert not is_far(prompt, [])
    assert not is_far(prompt, [f"w{number}" for number in range(2000)]), "the list is full: other words may be known"
    assert "the" not in content_words(prompt)
