"""Segments to ids and labels."""

from larp_mllm.model.vocabulary import IGNORE, Vocabulary
from larp_mllm.processing.sequence import (
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


def test_continuation_learns_the_clip_but_neither_the_given_frames_nor_where_it_begins():
    sequence = encode(continuation([5], [3, 4], [3, 6]), FULL)
    prompt = FULL.continuation([5], [3, 4])
    assert sequence.ids.tolist() == [*prompt, C(3), C(6), END, 2]
    assert prompt == [1, 5, *V.span([3, 4]), START]
    assert sequence.labels.tolist() == [IGNORE] * len(prompt) + [C(3), C(6), IGNORE, IGNORE]
    assert encode(continuation([], [3, 4], [3, 6]), BARE).ids.tolist()[:5] == BARE.continuation([], [3, 4])


def test_chats_bring_their_own_begin_and_end():
    segments = text_to_video([5, 6], [3, 4])
    assert encode(segments, FULL, framed=False).ids.tolist() == encode(segments, BARE).ids.tolist()


def test_interleaved_records_keep_their_order():
    segments = interleaved("a <video> b<video>", [([1, 2], True), ([3, 4], True)], lambda text: [len(text)])
    assert segments == [
        Segment("text", (2,), True),
        Segment("video", (1, 2), True),
        Segment("text", (2,), True),
        Segment("video", (3, 4), True),
    ]
    assert encode(segments, BARE).ids.tolist() == [2, *V.span([1, 2]), 2, *V.span([3, 4])]
    assert encode(segments, FULL).labels[-1] == FULL.eos, "a record that is learned whole teaches where it ends"


def test_loss_flags_of_text_and_videos_are_kept():
    segments = interleaved("a<video>b<video>", [([1, 2], False), ([3, 4], True)], lambda text: [9], loss=False)
    labels = encode(segments, FULL).labels.tolist()
    assert [label for label in labels if label != IGNORE] == [START, C(3), C(4)]


def test_the_decision_to_show_another_video_is_learned_only_after_a_learned_one():
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
