"""Segments -> ids and labels."""

from larp_mllm.model.vocabulary import IGNORE, Vocabulary
from larp_mllm.processing.token_sequence import (
    Layout,
    Segment,
    check_length,
    continuation,
    encode,
    interleaved,
    text_to_video,
    video_to_text,
)

import pytest

V = Vocabulary(text_size=100, codebook_size=8, tokens_per_video=2)
BARE, FULL = Layout(V, None, None), Layout(V, 1, 2)
START, END = V.video_start, V.video_end
C = V.code_to_id


def test_targets_of_text_to_video_are_video_start_and_the_codes():
    sequence = encode(text_to_video([5, 6], [3, 4]), FULL)
    assert sequence.ids.tolist() == [1, 5, 6, START, C(3), C(4), END, 2]
    assert sequence.labels.tolist() == [IGNORE, IGNORE, IGNORE, START, C(3), C(4), IGNORE, IGNORE]
    assert sequence.targets == 3


def test_an_empty_caption_gives_the_unconditional_prompt():
    sequence = encode(text_to_video([], [3, 4]), FULL)
    assert sequence.ids.tolist()[:2] == FULL.prompt([]) == [1, START]
    assert sequence.labels.tolist() == [IGNORE, IGNORE, C(3), C(4), IGNORE, IGNORE]


def test_targets_of_video_to_text_are_the_caption_and_the_end():
    sequence = encode(video_to_text([5, 6], [3, 4]), FULL)
    assert sequence.ids.tolist() == [*FULL.question([3, 4]), 5, 6, 2]
    assert sequence.labels.tolist() == [IGNORE] * 5 + [5, 6, 2]


def test_prompts_are_the_beginnings_of_the_training_sequences():
    for layout in (BARE, FULL):
        prompt = layout.prompt([5, 6])
        assert encode(text_to_video([5, 6], [3, 4]), layout).ids.tolist()[: len(prompt)] == prompt
        question = layout.question([3, 4])
        assert encode(video_to_text([5, 6], [3, 4]), layout).ids.tolist()[: len(question)] == question


def test_targets_of_continuation_are_the_codes_of_the_clip_alone():
    sequence = encode(continuation([5], [3, 4], [3, 6]), FULL)
    prompt = FULL.continuation([5], [3, 4])
    assert sequence.ids.tolist() == [*prompt, C(3), C(6), END, 2]
    assert prompt == [1, 5, *V.span([3, 4]), START]
    assert sequence.labels.tolist() == [IGNORE] * len(prompt) + [C(3), C(6), IGNORE, IGNORE]
    assert encode(continuation([], [3, 4], [3, 6]), BARE).ids.tolist()[:5] == BARE.continuation([], [3, 4])


def test_begin_and_end_ids_can_be_left_out():
    segments = text_to_video([5, 6], [3, 4])
    assert encode(segments, FULL, add_special_tokens=False).ids.tolist() == encode(segments, BARE).ids.tolist()


def test_interleaved_records_keep_their_order():
    segments = interleaved("a <video> b<video>", [([1, 2], True), ([3, 4], True)], lambda text: [len(text)])
    assert segments == [
        Segment("text", (2,), True),
        Segment("video", (1, 2), True),
        Segment("text", (2,), True),
        Segment("video", (3, 4), True),
    ]
    assert encode(segments, BARE).ids.tolist() == [2, *V.span([1, 2]), 2, *V.span([3, 4])]
    assert encode(segments, FULL).labels[-1] == FULL.eos, "the end is a target if all segments are"


def test_loss_flags_of_text_and_videos_select_the_targets():
    segments = interleaved("a<video>b<video>", [([1, 2], False), ([3, 4], True)], lambda text: [9], loss=False)
    labels = encode(segments, FULL).labels.tolist()
    assert [label for label in labels if label != IGNORE] == [START, C(3), C(4)]


def test_the_start_of_another_video_is_a_target_only_after_a_target_video():
    def starts(*losses):
        segments = interleaved("<video><video>", [([1, 2], loss) for loss in losses], lambda text: [])
        return encode(segments, FULL).labels.tolist().count(START)

    assert starts(True, True) == 1
    assert starts(False, True) == 0


def test_placeholders_and_videos_must_match():
    with pytest.raises(ValueError, match=r"line 7.*1 <video> placeholders but 2 videos: add <video>"):
        interleaved("<video>", [([1, 2], True)] * 2, lambda text: [], where="line 7")
    with pytest.raises(ValueError, match=r"line 7.*1 <video> placeholders but 0 videos: name the missing"):
        interleaved("<video>", [], lambda text: [], where="line 7")


def test_nothing_is_truncated():
    check_length(8, 8, "clip")
    with pytest.raises(ValueError, match=r"9 ids.*8 positions"):
        check_length(9, 8, "clip")
