"""Token caches as training sequences."""

import dataclasses
from collections import Counter

from larp_mllm.dataset import PHRASINGS, CaptionedVideos, Tasks, caption_phrases, evaluation_rows, mirrored
from larp_mllm.sequence import IGNORE
from tests.larp_mllm.tiny import CAPTIONS, open_cache

import pytest
import torch


@pytest.fixture
def data(qwen, tmp_path):
    return CaptionedVideos(open_cache(tmp_path), qwen.processor.layout, qwen.processor.encode_text, 1024)


def ids(sequences):
    return [sequence.ids.tolist() for sequence in sequences]


def test_batches_follow_from_seed_and_step(data):
    again, other = data.batch(3, 16, seed=1, tasks=Tasks()), data.batch(4, 16, seed=1, tasks=Tasks())
    assert ids(data.batch(3, 16, seed=1, tasks=Tasks())) == ids(again) != ids(other)
    assert ids(data.batch(3, 16, seed=2, tasks=Tasks())) != ids(again)


def test_task_weights_and_caption_dropout_are_kept(data):
    vocabulary = data.layout.vocabulary

    def kinds(tasks):
        first = [sequence.ids[0].item() for sequence in data.batch(0, 400, 0, tasks)]
        labelled = [
            bool(((s.labels != IGNORE) & vocabulary.is_code(s.labels)).any()) for s in data.batch(0, 400, 0, tasks)
        ]
        return Counter(
            "video-to-text" if not codes else "dropped" if start == vocabulary.video_start else "text-to-video"
            for start, codes in zip(first, labelled, strict=True)
        )

    found = kinds(Tasks(text_to_video=3, video_to_text=1, caption_dropout=0.2))
    assert 60 < found["video-to-text"] < 140
    assert 35 < found["dropped"] < 90
    assert set(kinds(Tasks(1, 0, 0))) == {"text-to-video"}
    assert set(kinds(Tasks(0, 1))) == {"video-to-text"}


@pytest.mark.parametrize("wrong", [(-1, 1), (0, 0), (1, 1, 1.0)])
def test_bad_tasks_are_refused(wrong):
    with pytest.raises(ValueError, match=r"task weights|caption_dropout"):
        Tasks(*wrong)


def test_classes_come_in_several_phrasings_and_captions_as_they_are(tmp_path):
    cache = open_cache(tmp_path / "a", classes=("Surfing", "HorseRiding"))
    assert caption_phrases(cache)[1] == tuple(p.format("horse riding") for p in PHRASINGS)
    assert "a person surfing" in caption_phrases(cache)[0]
    assert caption_phrases(open_cache(tmp_path / "b"))[0] == (CAPTIONS[0],)


def test_mirrored_clips_have_mirrored_captions(tmp_path):
    assert mirrored("a Left turn, then right; leftover") == "a Right turn, then left; leftover"
    cache = open_cache(tmp_path)
    cache = dataclasses.replace(cache, flipped=torch.ones_like(cache.flipped))
    assert caption_phrases(cache)[0] == ("a red circle moving right",)


def test_a_video_without_any_text_is_named(tmp_path):
    cache = open_cache(tmp_path)
    cache = dataclasses.replace(cache, captions=(None,) * len(cache))
    with pytest.raises(ValueError, match="video0 has neither a caption nor a class"):
        caption_phrases(cache)


def test_a_sequence_longer_than_the_base_is_an_error(qwen, tmp_path):
    short = CaptionedVideos(open_cache(tmp_path), qwen.processor.layout, qwen.processor.encode_text, 8)
    with pytest.raises(ValueError, match=r"video0.*8 positions"):
        short.fixed(0, "text_to_video")


def test_evaluation_rows_are_spread():
    assert evaluation_rows(3, 10) == [0, 1, 2]
    assert evaluation_rows(100, 3) == [0, 50, 99]
