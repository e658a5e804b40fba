"""Packing and collating: records share rows without attending to each other, and nothing is lost."""

from larp_mllm.data.collate import collate, pack
from larp_mllm.model.vocabulary import IGNORE
from larp_mllm.processing.token_sequence import Layout, TokenSequence, encode, text_to_video, video_to_text

import pytest
import torch


def some(*sizes):
    """Sequences of these lengths; all ids of one are its number and are learned."""
    return [TokenSequence(torch.full((size,), i), torch.full((size,), i)) for i, size in enumerate(sizes)]


def numbers(rows):
    return [[int(sequence.ids[0]) for sequence in row] for row in rows]


@pytest.fixture
def records(mllm):
    generator = torch.Generator().manual_seed(0)
    layout = Layout(mllm.model.vocabulary, None, 0)
    found = []
    for size, make in ((7, text_to_video), (3, video_to_text), (1, text_to_video), (12, video_to_text)):
        text = torch.randint(3, 300, (size,), generator=generator).tolist()
        codes = torch.randint(0, 16, (4,), generator=generator).tolist()
        found.append(encode(make(text, codes), layout))
    # One that begins with a learned id, which without a begin id nothing predicts.
    return [*found, TokenSequence(found[0].ids[:5], found[0].ids[:5])]


def test_packing_is_first_fit_longest_first():
    assert numbers(pack(some(3, 7, 5, 4, 1), length=8)) == [[1, 4], [2, 0], [3]]
    assert numbers(pack(some(2, 2, 2), length=4)) == [[0, 1], [2]], "of equal ones, the first comes first"


def test_without_a_length_rows_are_as_long_as_is_cheapest():
    one_long = pack(some(520, 290, *[266] * 14), multiple=2)
    assert len(one_long) == 10 and max(sum(len(s.ids) for s in row) for row in one_long) == 556, "two share a row"
    alike = pack(some(280, *[266] * 15), multiple=2)
    assert len(alike) == 16, "wider rows have no less padding, and attention would see more"
    assert len(pack(some(7, 3, 2, 2))) == 2
    assert len(pack(some(520, *[266] * 3), together=False)) == 4
    assert pack([], multiple=2) == []


def test_the_number_of_rows_is_a_multiple():
    rows = pack(some(5, 5, 5), length=5, multiple=4)
    assert numbers(rows[:3]) == [[0], [1], [2]]
    assert rows[3:] == [[]]
    assert len(pack(some(5, 5), length=10, multiple=1)) == 1


def test_a_record_longer_than_a_row_is_an_error_with_both_lengths():
    with pytest.raises(
        ValueError, match=r"1 of 3 records .* row of 8 ids, the longest has 9: raise --sequence-length to 9"
    ):
        pack(some(9, 8, 1), length=8)


def test_positions_restart_at_each_record_and_no_label_crosses():
    batch = collate(pack(some(3, 2, 4), length=7), width=8)
    assert batch["input_ids"].tolist() == [[2, 2, 2, 2, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert batch["labels"].tolist()[0] == [IGNORE, 2, 2, 2, IGNORE, 0, 0, IGNORE]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3, 4, 5]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_rows_of_one_record_are_padded_on_the_right_and_need_no_mask():
    batch = collate([[sequence] for sequence in some(3, 5)])
    assert batch["input_ids"].shape == (2, 5)
    assert batch["labels"].tolist()[0] == [IGNORE, 0, 0, IGNORE, IGNORE]
    assert (batch["position_ids"].diff(dim=1) == 1).all(), "positions that restart would cost a mask"


def test_an_empty_row_is_padding_and_a_narrow_width_is_refused():
    batch = collate([[], some(2)], width=3)
    assert batch["labels"][0].tolist() == [IGNORE] * 3
    assert collate([[]])["input_ids"].shape == (1, 1)
    with pytest.raises(ValueError, match=r"5 ids.*width 4"):
        collate([some(3, 2)], width=4)


def test_the_packed_loss_is_the_sum_of_the_separate_ones(mllm, records):
    rows = pack(records, length=40, multiple=3)
    assert max(map(len, rows)) > 1
    assert [] in rows
    packed = mllm.model(**collate(rows, width=44), num_items_in_batch=1)
    alone = [mllm.model(**collate([[record]]), num_items_in_batch=1) for record in records]
    assert packed.loss.item() == pytest.approx(sum(out.loss.item() for out in alone), rel=1e-5)
    for part in ("text_count", "video_count"):
        assert packed[part].item() == sum(out[part].item() for out in alone)
    assert packed.text_count + packed.video_count == sum(record.targets for record in records)


def test_a_record_does_not_see_the_others_of_its_row(mllm, records):
    def logits(*row):
        batch = collate([list(row)], width=64)
        return mllm.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]

    first, second, third = records[:3]
    other = TokenSequence(first.ids.flip(0), first.labels)
    before, after = logits(first, second, third), logits(other, second, third)
    own, rest = slice(0, len(first.ids)), slice(len(first.ids), None)
    torch.testing.assert_close(before[rest], after[rest], rtol=0, atol=0)
    assert (before[own] - after[own]).abs().max() > 1e-3
    alone = logits(second)[: len(second.ids)]
    torch.testing.assert_close(before[len(first.ids) :][: len(second.ids)], alone, rtol=1e-5, atol=1e-5)
