"""Damaged videos give their frames or an error: no crash, no endless reading, no short or black clip without a word."""

from tests.larp.data.fuzzed_videos import fuzz, mutated

import pytest


@pytest.mark.slow
def test_200_mutated_videos_of_five_kinds_behave():
    report = fuzz(200)
    assert report["behaved"] == 200, report["faults"]
    assert report["found"]["refused"] > 50 and report["found"]["other frames"] > 20  # the mutations reach the frames


def test_mutations_are_functions_of_their_number():
    data = bytes(range(256)) * 8
    assert mutated(data, 5) == mutated(data, 5) != mutated(data, 6)
