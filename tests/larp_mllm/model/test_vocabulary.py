"""The id layout."""

from larp_mllm.model.vocabulary import Vocabulary

import pytest
import torch

V = Vocabulary(text_size=100, codebook_size=8, tokens_per_video=3)


def test_video_ids_follow_the_larger_of_the_two_vocabularies():
    assert Vocabulary.for_base(151936, 151646, 8, 3).video_start == 151936
    assert Vocabulary.for_base(32000, 32003, 8, 3).video_start == 32003
    assert (V.video_start, V.video_end, V.first_code, V.size) == (100, 101, 102, 110)


def test_every_id_has_exactly_one_kind():
    ids = torch.arange(V.size)
    assert ids[~(V.is_text(ids) | V.is_code(ids))].tolist() == [V.video_start, V.video_end]
    assert V.is_text(ids).sum() == 100 and V.is_code(ids).sum() == 8
    assert torch.equal(V.id_to_code(V.code_to_id(torch.arange(8))), torch.arange(8))


def test_span_and_split_are_inverse():
    ids = [5, 6, *V.span([1, 2, 3]), 7, *V.span([0, 0, 7])]
    assert V.split(ids) == [("text", [5, 6]), ("video", [1, 2, 3]), ("text", [7]), ("video", [0, 0, 7])]


@pytest.mark.parametrize("codes, word", [([1, 2], "3 codes"), ([1, 2, 8], r"\[0, 8\)"), ([-1, 2, 3], r"\[0, 8\)")])
def test_span_refuses_codes_of_another_tokenizer(codes, word):
    with pytest.raises(ValueError, match=word):
        V.span(codes)


@pytest.mark.parametrize("ids", [[100, 102, 103], [100, 102, 5, 104, 101], [102], [101], [100, 102, 103, 104, 5]])
def test_split_refuses_broken_spans(ids):
    with pytest.raises(ValueError, match="position"):
        V.split(ids)


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="codebook_size"):
        Vocabulary(10, 0, 4)
