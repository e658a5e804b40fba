"""Captions of mirrored videos: directions change places, other uses of left and right stay."""

from larp_mllm.data.mirroring import mirrored

import pytest


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a red circle moving left", "a red circle moving right"),
        ("a man turns right at the corner", "a man turns left at the corner"),
        ("turning sharply left into the street", "turning sharply right into the street"),
        ("he steps to the left, then to the right", "he steps to the right, then to the left"),
        ("a dog on the right of the car", "a dog on the left of the car"),
        ("a man on the left is dancing", "a man on the right is dancing"),
        ("on the right a man stands", "on the left a man stands"),
        ("on his right side", "on his left side"),
        ("she waves her left hand", "she waves her right hand"),
        ("the man's left foot", "the man's right foot"),
        ("in the right lane", "in the left lane"),
        ("Pulling something from right to left", "Pulling something from left to right"),
        ("Turning the camera left while filming something", "Turning the camera right while filming something"),
        ("a ball in the top left corner", "a ball in the top right corner"),
        ("looks left and right", "looks right and left"),
        ("a Left turn, then right; leftover", "a Right turn, then left; leftover"),
        ("one walks left and the other right", "one walks right and the other left"),
        ("the leftmost ball rolls rightwards", "the rightmost ball rolls leftwards"),
        ("a left-handed player", "a right-handed player"),
        ("LEFT to Right", "RIGHT to Left"),
        ("A man left the room to the left", "A man left the room to the right"),
        ("Sliding Two Fingers Left", "Sliding Two Fingers Right"),
        ("a bottom-right logo, moving up-left", "a bottom-left logo, moving up-right"),
        ("he goes left, and the ball goes right", "he goes right, and the ball goes left"),
        ("a circle left of a square", "a circle right of a square"),
        ("İ next to her left, moving left", "İ next to her right, moving right"),
    ],
)
def test_directions_change_places_and_back(caption, expected):
    assert mirrored(caption) == expected
    assert mirrored(expected) == caption


@pytest.mark.parametrize(
    "caption",
    [
        "A man left the room",
        "a man moving the box left the room",
        "the woman next to her left the room",
        "two minutes left",
        "there is nothing left",
        "what is left of the house",
        "the food left over",
        "a person left",
        "he was right",
        "the right tool",
        "at the right time, in the right way",
        "on the right track",
        "right now a man sings",
        "all right",
        "to right the boat",
        "he runs right through the wall",
        "she stands right behind him",
        "the baby looks right at the camera",
        "a bright copyright of leftovers",
        "everything goes right",
        "turn the cup right side up",
        "the right of the people, politicians of the left",
        "he looks left out",
        "He left, then right away came back",
        "driving the car he left",
        "what is left, all right",
    ],
)
def test_verbs_adjectives_and_adverbs_stay(caption):
    assert mirrored(caption) == caption
