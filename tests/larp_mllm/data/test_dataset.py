"""Token caches, records and text as training sequences of mixed tasks."""

import dataclasses
import re
from collections import Counter

from larp.data import token_cache
from larp.data.listing import CAPTION_BREAK
from larp.data.token_cache import TokenCache
from larp_mllm.data.dataset import (
    NUM_DIALOGUES,
    REQUESTS,
    TASKS,
    CaptionedVideos,
    Tasks,
    TrainingMix,
    dialogue,
    evaluation_rows,
    sample_dialogue,
)
from larp_mllm.data.phrases import PHRASINGS, caption_phrases, drop_mirrored_directions
from larp_mllm.data.records import RecordSet
from larp_mllm.data.text_data import TextSet
from larp_mllm.model.vocabulary import IGNORE
from larp_mllm.processing.chat import chat_segments
from larp_mllm.processing.token_sequence import TokenSequence, encode
from tests.larp_mllm.tiny import CAPTIONS, K, open_cache

import pytest
import torch


@pytest.fixture
def data(qwen, tmp_path):
    return CaptionedVideos(open_cache(tmp_path), qwen.processor.layout, qwen.processor.encode_text, 1024)


@pytest.fixture
def with_given(qwen, tmp_path):
    """With codes of given frames: K - 1 minus those of the whole clip."""
    cache = open_cache(tmp_path)
    cache = dataclasses.replace(cache, conditions=K - 1 - cache.codes)
    return CaptionedVideos(cache, qwen.processor.layout, qwen.processor.encode_text, 1024)


@pytest.fixture
def records():
    return RecordSet([TokenSequence(torch.tensor([7, i]), torch.tensor([IGNORE, i])) for i in range(5)], ["r"] * 5)


@pytest.fixture
def text(qwen):
    documents = [f"document {i}" for i in range(7)]
    return TextSet(documents, lambda document: [8, int(document[-1])], qwen.processor.layout, 16)


def only(**weights):
    return Tasks(**(dict.fromkeys(TASKS, 0.0) | weights))


def ids(sequences):
    return [sequence.ids.tolist() for sequence in sequences]


def test_batches_follow_from_seed_and_step(with_given, records, text):
    mix = TrainingMix(Tasks(), with_given, records, text)
    again, other = mix.batch(3, 16, seed=1), mix.batch(4, 16, seed=1)
    mix.batch(9, 16, seed=3)
    assert ids(mix.batch(3, 16, seed=1)) == ids(again) != ids(other)
    assert ids(mix.batch(3, 16, seed=2)) != ids(again)
    assert ids(TrainingMix(Tasks(), with_given, records, text).batch(4, 16, seed=1)) == ids(other)


def test_what_a_batch_holds_is_named(with_given, text):
    rows = [TokenSequence(torch.tensor([7, i]), torch.tensor([IGNORE, i])) for i in range(5)]
    records = RecordSet(rows, [f"chats.jsonl:{i}" for i in range(5)])
    mix = TrainingMix(Tasks(), with_given, records, text)
    names, found = mix.clips_of(3, 64, seed=1), ids(mix.batch(3, 64, seed=1))
    assert all(sequence == [7, int(name[-1])] for name, sequence in zip(names, found, strict=True) if "jsonl" in name)
    assert set(with_given.cache.names) & set(names) and set(records.names) & set(names)
    assert any(re.fullmatch(r"text \d+", name) for name in names)


def kinds(mix, vocabulary, size=600):
    """Count the tasks of the sequences of a batch, recognised by their ids."""

    def kind(sequence):
        found = sequence.ids.tolist()
        if found[0] in (7, 8):
            return {7: "interleaved", 8: "text"}[found[0]]
        scored = sequence.labels[sequence.labels != IGNORE]
        if not vocabulary.is_code(scored).any():
            return "video_to_text"
        videos = found.count(vocabulary.video_start)
        text = vocabulary.is_text(sequence.ids[0])
        return {1: "text_to_video", 2: "continuation"}[videos] + ("" if text else " without text")

    return Counter(kind(sequence) for sequence in mix.batch(0, size, 0))


def test_tasks_are_sampled_by_their_weights(with_given, records, text):
    # Chats have no data: these rows were given no text tokenizer.
    tasks = Tasks(3, 1, 5, 1, 0.5, 0.5, caption_dropout=0.2, continuation_text=0.3)
    mix = TrainingMix(tasks, with_given, records, text)
    shares = dict(
        zip((t for t in TASKS if t not in ("chat", "own_answers")), (1 / 2, 1 / 6, 1 / 6, 1 / 12, 1 / 12), strict=True)
    )
    assert mix.shares == pytest.approx(shares)
    found = kinds(mix, with_given.layout.vocabulary)
    expected = {
        "text_to_video": 240, "text_to_video without text": 60, "video_to_text": 100, "continuation": 30,
        "continuation without text": 70, "interleaved": 50, "text": 50,
    }  # fmt: skip
    assert set(found) == set(expected)
    assert all(abs(found[kind] - count) < 4 * count**0.5 for kind, count in expected.items()), found


def test_tasks_without_data_are_left_out(data, with_given, records, text):
    assert TrainingMix(Tasks(), data).shares == pytest.approx({"text_to_video": 0.75, "video_to_text": 0.25})
    assert TrainingMix(Tasks(), None, records, text).shares == {"interleaved": 0.5, "text": 0.5}
    mix = TrainingMix(only(continuation=1), with_given, records, text)
    assert mix.shares == {"continuation": 1}
    assert set(kinds(mix, data.layout.vocabulary, 80)) == {"continuation", "continuation without text"}
    mix = TrainingMix(only(text_to_video=1, text=1), data, records)
    assert set(kinds(mix, data.layout.vocabulary, 80)) == {"text_to_video", "text_to_video without text"}


@pytest.mark.parametrize("given", [{}, {"data"}, {"records"}])
def test_a_mix_of_nothing_is_an_error(data, records, given):
    found = {"data": data, "records": records}
    with pytest.raises(ValueError, match=r"nothing to train on: .*weights only for text 1.*--tokens"):
        TrainingMix(only(text=1), *(found[name] if name in given else None for name in found))


def test_every_row_of_a_source_comes_once_in_an_epoch(with_given, records):
    mix = TrainingMix(only(interleaved=1), None, records)
    sampled = [s.ids[1].item() for step in range(3) for s in mix.batch(step, 5, 0)]
    assert [sorted(sampled[k : k + 5]) for k in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert sampled[:5] != sampled[5:10], "in another order"
    # the tasks of videos share one order: a row that is taken by one is not taken by another before the epoch is over
    rows = len(with_given)
    codes = dataclasses.replace(with_given.cache, codes=torch.arange(rows)[:, None] // torch.tensor([1, 16, 1, 1]) % 16)
    with_given.cache = codes
    mix = TrainingMix(Tasks(), with_given)
    vocabulary = with_given.layout.vocabulary
    seen = [vocabulary.split(s.ids) for s in mix.batch(0, rows, 0)]
    last = [[content for kind, content in parts if kind == "video"][-1] for parts in seen]
    assert sorted(last) == sorted(codes.codes.tolist())


@pytest.mark.parametrize(
    "wrong",
    [
        {"text": -1},
        {"text": float("nan")},
        {"text": float("inf")},
        {"caption_dropout": 1.0},
        {"continuation_text": 1.1},
    ],
)
def test_bad_tasks_are_refused(wrong):
    with pytest.raises(ValueError, match=r"task weights .* text|caption_dropout|continuation_text"):
        Tasks(**wrong)
    with pytest.raises(ValueError, match=r"must not all be 0"):
        only()


def test_continuation_is_given_the_codes_of_the_first_frames(with_given):
    layout, cache = with_given.layout, with_given.cache
    sequence = with_given.sequence(1, "a blue square", "continuation")
    prompt = layout.continuation(with_given._ids("a blue square"), cache.conditions[1].tolist())
    assert sequence.ids.tolist()[: len(prompt)] == prompt
    assert layout.vocabulary.split(sequence.ids)[2] == ("video", cache.codes[1].tolist())
    assert sequence.targets == 4, "the codes of the clip alone"
    assert (
        with_given.evaluation_sequence(1, "continuation").ids.tolist()[:1]
        == layout.continuation([], cache.conditions[1])[:1]
    )
    assert with_given.evaluation_sequence(1, "text_to_video").ids.tolist()[:1] == with_given._ids(CAPTIONS[1])[:1]


def test_continuation_needs_given_frames(data):
    with pytest.raises(ValueError, match="extract the tokens with --condition-frames"):
        data.evaluation_sequence(0, "continuation")


def test_classes_come_in_several_phrasings_and_captions_as_they_are(qwen, tmp_path):
    cache = open_cache(tmp_path / "a", classes=("Surfing", "HorseRiding"))
    assert caption_phrases(cache)[1] == tuple(p.format("horse riding") for p in PHRASINGS)
    assert "a person surfing" in caption_phrases(cache)[0]
    assert caption_phrases(open_cache(tmp_path / "b"))[0] == (CAPTIONS[0],)
    data = CaptionedVideos(cache, qwen.processor.layout, qwen.processor.encode_text, 1024)
    sampled = TrainingMix(only(video_to_text=1), data).batch(0, 80, 0)
    written = (sequence.labels[sequence.labels != IGNORE] for sequence in sampled)
    texts = {qwen.processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in written}
    assert texts == {phrasing.format(name) for phrasing in PHRASINGS for name in ("surfing", "horse riding")}


def test_one_of_several_captions_is_drawn_at_each_use(qwen, tmp_path):
    captions = ("a dog runs", "the dog is running", "run, dog")
    cache = open_cache(tmp_path, rows=4, captions=[CAPTION_BREAK.join(captions), "rain"])
    data = CaptionedVideos(cache, qwen.processor.layout, qwen.processor.encode_text, 1024)
    assert set(data.phrases) == {captions, ("rain",)}
    sampled = TrainingMix(only(video_to_text=1), data).batch(0, 80, 0)
    written = (sequence.labels[sequence.labels != IGNORE] for sequence in sampled)
    texts = Counter(qwen.processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in written)
    assert set(texts) == {*captions, "rain"} and texts["rain"] == 40


def test_mirrored_clips_whose_caption_says_left_or_right_are_left_out(qwen, tmp_path):
    captions = ["a car turns left", "a car stops", "Right-handed players", "a bright leftover"]
    cache = open_cache(tmp_path, rows=8, captions=captions)
    cache = dataclasses.replace(cache, flipped=torch.arange(8) >= 4)
    data = CaptionedVideos(cache, qwen.processor.layout, qwen.processor.encode_text, 1024)
    assert data.cache.names == tuple(f"video{number}" for number in (0, 1, 2, 3, 5, 7))
    assert [texts[0] for texts in data.phrases] == [*captions, captions[1], captions[3]]
    assert data.cache.flipped.tolist() == [False] * 4 + [True] * 2
    assert torch.equal(data.cache.codes, cache.codes[[0, 1, 2, 3, 5, 7]])


def test_mirrored_clips_of_classes_are_all_used(tmp_path):
    cache = open_cache(tmp_path, classes=("Surfing", "HorseRiding"))
    cache = dataclasses.replace(cache, flipped=torch.ones_like(cache.flipped))
    assert drop_mirrored_directions(cache) is cache


def test_chats_teach_the_answer_alone(qwen, tmp_path):
    """A request and its video, or a video, a question and its caption: the prompt of `chat` begins the learned sequence."""
    processor, cache = qwen.processor, open_cache(tmp_path)
    data = CaptionedVideos(cache, processor.layout, processor.encode_text, 1024, processor.tokenizer)
    codes, caption, v = cache.codes[0].tolist(), data.phrases[0][0], processor.vocabulary
    for form in range(NUM_DIALOGUES):
        sequence = data.sequence(0, caption, "chat", form)
        ids, labels = sequence.ids.tolist(), sequence.labels.tolist()
        question = chat_segments(
            dialogue(form, caption, codes)[:1],
            processor.tokenizer,
            processor.encode_text,
            lambda part: part["video"],
            add_generation_prompt=True,
        )
        prompt = encode(question, processor.layout, add_special_tokens=False).ids.tolist()
        assert ids[: len(prompt)] == prompt
        assert set(labels[: len(prompt)]) == {IGNORE}
        learned = [label for label in labels if label != IGNORE]
        end = processor.tokenizer.eos_token_id
        if form < len(REQUESTS):
            assert learned == [v.video_start, *map(v.code_to_id, codes), end]
        else:
            assert learned[-1] == end
            assert processor.decode_text(learned[:-1]) == caption
    assert [sample_dialogue(u) for u in (0.0, 0.49, 0.5, 0.999)] == [
        0,
        len(REQUESTS) - 1,
        len(REQUESTS),
        NUM_DIALOGUES - 1,
    ]
    mix = TrainingMix(only(chat=1), data)
    for sequence in mix.batch(0, 64, 0):
        assert sequence.ids.tolist().count(v.video_start) == 1
        assert sequence.targets > 0


def test_a_video_without_any_text_is_named(tmp_path):
    cache = open_cache(tmp_path)
    cache = dataclasses.replace(cache, captions=(None,) * len(cache))
    with pytest.raises(ValueError, match="video0 has neither a caption nor a class"):
        caption_phrases(cache)


def test_videos_without_any_text_are_left_out_beside_others(tmp_path, qwen):
    cache, processor = open_cache(tmp_path), qwen.processor
    some = dataclasses.replace(cache, captions=(None, *cache.captions[1:]))
    data = CaptionedVideos(some, processor.layout, processor.encode_text, 1024, processor.tokenizer)
    assert len(data) == len(cache) - 1 and data.phrases[0] == (cache.captions[1],)
    assert data.left_out["neither a caption nor a class"] == 1
    with pytest.raises(ValueError, match="video0 has neither a caption nor a class"):
        CaptionedVideos(
            dataclasses.replace(cache, captions=(None,) * len(cache)), processor.layout, processor.encode_text, 1024
        )


def test_a_mapped_cache_gives_the_sequences_of_one_in_memory(tmp_path, qwen, monkeypatch):
    processor, memory = qwen.processor, open_cache(tmp_path, rows=12)
    monkeypatch.setattr(token_cache, "MAPPED_FROM", 1)
    mapped = TokenCache.open(memory.folder)
    assert type(mapped) is not type(memory)
    one, other = (
        CaptionedVideos(cache, processor.layout, processor.encode_text, 1024, processor.tokenizer)
        for cache in (memory, mapped)
    )
    for step in range(3):
        both = zip(*(TrainingMix(Tasks(), data).batch(step, 8, 0) for data in (one, other)), strict=True)
        assert all(a.ids.tolist() == b.ids.tolist() and a.labels.tolist() == b.labels.tolist() for a, b in both)
    for over in (0, 40):
        found = [data.longest(data.training_candidates(Tasks(), over), over) for data in (one, other)]
        assert found[0] == found[1] is not None
    assert one.longest(one.training_candidates(Tasks(), 40), 40) == one.longest(one.training_candidates(Tasks()), 40)
    assert one.longest(one.training_candidates(Tasks(), 1000), 1000) is None


# Longest in characters; longest in ids (the tiny tokenizer knows no x); a leading space; decomposed characters.
UNEVEN = ("a red circle moving left, a red circle moving left", "xqxzxqxzxqxzxqxz", " v", "Fahrra\u0308der \ufdfa")


@pytest.fixture(scope="module", params=["captions", "classes"])
def uneven(request, qwen, tmp_path_factory):
    """Makes CaptionedVideos with all tasks and captions of different lengths."""
    made = {"captions": UNEVEN} if request.param == "captions" else {"classes": ("Kayaking", "XqzXqz")}
    cache = open_cache(tmp_path_factory.mktemp("uneven"), rows=12, **made)
    cache = dataclasses.replace(cache, conditions=cache.codes)

    def videos(positions=1024):
        processor = qwen.processor
        return CaptionedVideos(cache, processor.layout, processor.encode_text, positions, processor.tokenizer)

    return videos


@pytest.mark.parametrize(
    "tasks",
    [only(video_to_text=1), only(continuation=1), only(continuation=1, continuation_text=0), Tasks(chat=4)],
    ids=["video_to_text", "continuation", "continuation without text", "all"],
)
def test_the_longest_candidate_is_the_longest_sequence_that_is_sampled(uneven, tasks):
    data = uneven()
    ids, row, task = data.longest(data.training_candidates(tasks))
    count = 300 if tasks.chat else 100
    assert max(len(sequence.ids) for sequence in TrainingMix(tasks, data).batch(0, count, 0)) == ids
    assert getattr(tasks, task) > 0 and 0 <= row < len(data)
    # Texts that cannot be longest are not encoded; all others are compared.
    assert data.longest(data.training_candidates(tasks), ids) is None
    assert data.longest(data.training_candidates(tasks), ids - 1) == (ids, row, task)
    enough, short = uneven(ids), uneven(ids - 1)
    enough.check_lengths(enough.training_candidates(tasks))
    option = rf"leave the task out with --tasks\.{task.replace('_', '-')} 0"
    with pytest.raises(
        ValueError, match=rf"video\d+ \(.*\): {ids} ids, .* {ids - 1} positions: shorten the .*{option}"
    ):
        short.check_lengths(short.training_candidates(tasks))


def test_the_longest_evaluation_candidate_is_the_longest_sequence_that_is_evaluated(uneven):
    data = uneven()
    for tasks in (data.tasks, ["text_to_video"], ["continuation"]):
        longest = max(len(data.evaluation_sequence(row, task).ids) for row in range(len(data)) for task in tasks)
        assert data.longest(data.evaluation_candidates(tasks))[0] == longest


def test_texts_that_cannot_be_longest_are_not_encoded(qwen, tmp_path, monkeypatch):
    words = "zebra " * 30
    cache = open_cache(tmp_path, captions=[*CAPTIONS, words])
    data = CaptionedVideos(cache, qwen.processor.layout, qwen.processor.encode_text, 1024)
    data.longest(data.training_candidates(Tasks()), 170)
    assert set(data._encoded) == {"a", words}


def test_evaluation_rows_are_evenly_spaced():
    assert evaluation_rows(3, 10) == [0, 1, 2]
    assert evaluation_rows(100, 3) == [0, 50, 99]
