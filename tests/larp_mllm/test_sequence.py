"""Records to ids and labels, and batches of them."""

from larp_mllm.collate import collate
from larp_mllm.sequence import (
    IGNORE,
    Layout,
    Segment,
    check_length,
    encode,
    interleaved,
    text_to_video,
    video_to_text,
)
from larp_mllm.vocabulary import Vocabulary

import pytest
import torch

V = Vocabulary(text_size=100, codebook_size=8, tokens_per_video=2)
BARE, FULL = Layout(V, None, None), Layout(V, 1, 2)
START, END = V.video_start, V.video_end
C = V.code_to_id


def test_text_to_video_scores_the_decision_and_the_codes():
    sequence = encode(text_to_video([5, 6], [3, 4]), FULL)
    assert sequence.ids.tolist() == [1, 5, 6, START, C(3), C(4), END, 2]
    assert sequence.labels.tolist() == [IGNORE, IGNORE, IGNORE, START, C(3), C(4), IGNORE, IGNORE]
    assert sequence.targets == 3


def test_a_dropped_caption_is_the_unconditional_prompt():
    sequence = encode(text_to_video([], [3, 4]), FULL)
    assert sequence.ids.tolist()[:2] == FULL.prompt([]) == [1, START]
    assert sequence.labels.tolist() == [IGNORE, IGNORE, C(3), C(4), IGNORE, IGNORE]


def test_video_to_text_scores_the_caption_only():
    sequence = encode(video_to_text([5, 6], [3, 4]), FULL)
    assert sequence.ids.tolist() == [*FULL.question([3, 4]), 5, 6, 2]
    assert sequence.labels.tolist() == [IGNORE] * 5 + [5, 6, 2]


def test_prompts_are_the_beginnings_of_the_training_sequences():
    for layout in (BARE, FULL):
        prompt = layout.prompt([5, 6])
        assert encode(text_to_video([5, 6], [3, 4]), layout).ids.tolist()[: len(prompt)] == prompt
        question = layout.question([3, 4])
        assert encode(video_to_text([5, 6], [3, 4]), layout).ids.tolist()[: len(question)] == question


def test_interleaved_records_keep_their_order():
    record = {"text": "a <video> b<video>", "videos": [[1, 2], [3, 4]]}
    segments = interleaved(record, lambda text: [len(text)])
    assert segments == [
        Segment("text", (2,), True),
        Segment("video", (1, 2), True),
        Segment("text", (2,), True),
        Segment("video", (3, 4), True),
    ]
    assert encode(segments, BARE).ids.tolist() == [2, *V.span([1, 2]), 2, *V.span([3, 4])]
    assert encode(segments, FULL).labels[-1] == FULL.eos, "a record that is learned whole teaches where it ends"


def test_placeholders_and_videos_must_match():
    with pytest.raises(ValueError, match=r"line 7.*1 <video> placeholders but 2 videos"):
        interleaved({"text": "<video>", "videos": [[1, 2], [3, 4]]}, lambda text: [], where="line 7")


def test_nothing_is_truncated():
    check_length(8, 8, "clip")
    with pytest.raises(ValueError, match=r"9 ids.*8 positions"):
        check_length(9, 8, "clip")


def test_collate_pads_on_the_right():
    batch = collate([encode(text_to_video([5, 6, 7], [3, 4]), FULL), encode(text_to_video([], [3, 4]), FULL)])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 9)
    assert batch["input_ids"].dtype == torch.int64
    assert batch["labels"][1].tolist()[6:] == [IGNORE] * 3
