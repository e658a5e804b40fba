"""The data of a run: what is trained on, what is held out and its name, leakage."""

import copy
import dataclasses
import json
import re
from pathlib import Path

from larp_mllm.data.corpus import TokenCaches, open_corpus, open_token_caches
from larp_mllm.data.dataset import Tasks
from larp_mllm.data.leakage import same_videos_of_records
from larp_mllm.data.records import RecordSet
from larp_mllm.data.text_data import ENOUGH, shipped_text
from larp_mllm.model.vocabulary import IGNORE
from larp_mllm.processing.token_sequence import TokenSequence
from tests.larp_mllm.tiny import open_cache, tiny_video_tokenizer

import pytest
import torch

WORDS = sorted(set(re.findall("[a-z]+", shipped_text()[0])))


def sentence(number, words=60):
    return " ".join(WORDS[(number * 17 + place * 7) % len(WORDS)] for place in range(words)) + f" {number}"


@pytest.fixture
def corpus(qwen, tmp_path):
    def corpus(documents=(), records=(), eval_text=(), videos=None, positions=1024, **options):
        text = ()
        if documents:
            (tmp_path / "a.txt").write_text("\n\n".join(documents))
            text = (f"txt:{tmp_path}/a.txt",)
        paths = ()
        if records:
            (tmp_path / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            paths = (tmp_path / "r.jsonl",)
        videos = videos or TokenCaches(None, None, qwen.processor.video_tokenizer)
        options = {
            "tasks": Tasks(),
            "text": text,
            "records": paths,
            "eval_text": eval_text,
            "encoded": tmp_path / "codes",
        } | options
        return open_corpus(videos, qwen.processor, positions, **options)

    return corpus


def rows(sequences):
    return {tuple(sequences[number].ids.tolist()) for number in range(len(sequences))}


def size(sequences):
    return sum(len(sequence.ids) for sequence in sequences)


def test_documents_are_held_out_where_there_are_many(corpus):
    found = corpus([sentence(number) for number in range(60)])
    assert found.held_out_text_name.startswith("one document in 20 of txt:")
    assert len(found.text) == 57 and len(found.held_out_text) == 3
    assert size(found.held_out_text) >= ENOUGH


@pytest.mark.parametrize("tiny", [[], ["A tiny one."]], ids=["one document", "one long and one tiny"])
def test_pieces_of_one_long_document_are_held_out(corpus, tiny):
    found = corpus([" ".join(sentence(number) for number in range(120)), *tiny], sequence_length=128)
    assert found.held_out_text_name.startswith("one piece in 20 of txt:")
    assert size(found.held_out_text) >= ENOUGH
    assert not rows(found.text) & rows(found.held_out_text), "held-out text is not trained on"


def test_little_text_is_not_split_and_the_shipped_text_is_held_out(corpus):
    found = corpus(["A tiny one.", *[f"Word {number}." for number in range(40)]])
    assert found.held_out_text_name == "the text that comes with the package"
    assert len(found.text) == 41
    assert size(found.held_out_text) > ENOUGH


def test_text_is_cut_by_the_sequence_length_or_512(corpus):
    long = [" ".join(sentence(number) for number in range(40))]
    for given, longest in ((None, 512), (64, 64), (1024, 1024)):
        found = corpus(long, sequence_length=given)
        assert max(map(len, rows(found.text))) == longest
    with pytest.raises(
        ValueError, match=r"sequence_length is 15, but text is cut into pieces .*raise it to 16 or more"
    ):
        corpus(long, sequence_length=15)


def test_a_sequence_that_is_too_long_is_an_error_before_training_begins(corpus, qwen, tmp_path):
    cache = open_cache(tmp_path / "given", rows=20, captions=["a zebra in the zoo", "an okapi"])
    given = TokenCaches(dataclasses.replace(cache, conditions=cache.codes), None, qwen.processor.video_tokenizer)
    evaluated = TokenCaches(None, given.train, qwen.processor.video_tokenizer)
    data = corpus(videos=given).videos
    found = {}
    for name, tasks in (("all", Tasks(chat=0)), ("without", Tasks(chat=0, continuation=0))):
        found[name] = ids = data.longest(data.training_candidates(tasks))[0]
        corpus(videos=given, tasks=tasks, sequence_length=ids)
        corpus(videos=given, tasks=tasks, positions=ids)
        with pytest.raises(ValueError, match=rf"of --tokens has {ids} ids, .*raise it to {ids} or more"):
            corpus(videos=given, tasks=tasks, sequence_length=ids - 1)
        with pytest.raises(ValueError, match=rf"{ids} ids, but the base model has {ids - 1} positions"):
            corpus(videos=given, tasks=tasks, positions=ids - 1)
    assert found["without"] < found["all"]
    # Held-out videos alone: captions in both directions.
    longest = data.longest(data.evaluation_candidates(["text_to_video", "video_to_text"]))[0]
    corpus(videos=evaluated, positions=longest)
    with pytest.raises(ValueError, match=f"{longest} ids, but"):
        corpus(videos=evaluated, positions=longest - 1)
    # Records without a weight are not sampled; held-out records are not packed.
    records = [{"text": f"record {number}"} for number in range(40)] + [{"text": "long " * 30}]
    corpus(videos=given, tasks=Tasks(chat=0, interleaved=0), records=records, sequence_length=found["all"])
    records[19], records[40] = records[40], records[19]
    corpus(records=records, sequence_length=20)
    with pytest.raises(ValueError, match="longest sequence of --records has"):
        corpus(records=[*records, {"text": "longer " * 30}], sequence_length=20)


def test_equal_records_stay_on_one_side(corpus, qwen):
    records = [{"id": number, "text": f"record {number // 2}"} for number in range(80)]
    found = corpus(records=records)
    assert len(found.held_out_records) == 4 and len(found.records) == 76
    assert not rows(found.records) & rows(found.held_out_records)
    found = corpus(records=[{"text": f"record {number}"} for number in range(40)])
    assert len(found.held_out_records) == 2
    # Each keeps its name, by which a skipped update is reported.
    for part in (found.records, found.held_out_records):
        lines = [int(name.rpartition(":")[2]) for name in part.names]
        texts = [qwen.processor.decode_text(part[row].ids) for row in range(len(part))]
        assert texts == [f"record {line - 1}" for line in lines]
    found = corpus(records=[{"text": "always the same"}] * 40)
    assert found.held_out_records is None and len(found.records) == 40


def test_more_tokens_without_tokens_are_refused(tmp_path):
    tokenizer = str(tiny_video_tokenizer().save_pretrained(tmp_path / "tokenizer"))
    with pytest.raises(ValueError, match="--more-tokens more is joined to the cache of --tokens"):
        open_token_caches(None, None, tokenizer, more=(Path("more"),))


def test_a_chat_template_that_cannot_be_trained_on_does_not_matter_without_the_task_chat(qwen, tmp_path):
    processor = copy.copy(qwen.processor)
    processor.tokenizer = copy.deepcopy(processor.tokenizer)
    processor.tokenizer.chat_template = "{{ messages[0]['content'].upper() }}"
    caches = [open_cache(tmp_path / name) for name in ("train", "held-out")]
    videos, options = TokenCaches(*caches, processor.video_tokenizer), {"encoded": tmp_path}
    with pytest.raises(ValueError, match="template"):
        open_corpus(videos, processor, 1024, tasks=Tasks(), **options)
    for length in (None, 64):
        found = open_corpus(videos, processor, 1024, tasks=Tasks(chat=0), sequence_length=length, **options)
        assert len(found.videos) == len(caches[0])


def test_leakage_is_reported(corpus, qwen, tmp_path):
    documents = [sentence(number) for number in range(4)]
    (tmp_path / "held-out.txt").write_text("\n\n".join([documents[1], sentence(9)]))
    caches = [open_cache(tmp_path / name, rows=rows) for name, rows in (("train", 6), ("held-out", 8))]
    videos = TokenCaches(caches[0], caches[1], qwen.processor.video_tokenizer)
    found = corpus(documents, videos=videos, eval_text=(f"txt:{tmp_path}/held-out.txt",))
    about_videos, about_text = found.notes
    assert about_videos.startswith(
        "6 of 8 held-out videos have the name of one that is trained on (video0, video1, video2, ...)"
    )
    assert about_text.startswith("1 of 2 held-out pieces of text are trained on as well: figures from these say little")
    assert found.summary["notes"] == [about_videos, about_text]
    assert corpus(documents, eval_text=(f"txt:{tmp_path}/held-out.txt",)).notes == (about_text,)
    assert corpus([sentence(number) for number in range(60)]).notes == ()


def test_records_that_share_a_video_with_held_out_ones_are_reported():
    sequences = [TokenSequence(torch.tensor([7, row]), torch.tensor([IGNORE, row])) for row in range(5)]
    shown = [[Path("a")], [Path("b"), Path("c")], [], [Path("c")], [Path("a")]]
    records = RecordSet(sequences, [f"r:{row}" for row in range(1, 6)], shown)
    (note,) = same_videos_of_records(records.names, records.videos, [1, 2])
    assert note.startswith("1 of 2 held-out records show a video that is trained on in another record (r:2): figures")
    assert same_videos_of_records(records.names, records.videos, [1, 3]) == []


def test_mirrored_clips_that_are_left_out_are_reported(corpus, qwen, tmp_path):
    cache = open_cache(tmp_path / "cache", rows=8)
    cache = dataclasses.replace(cache, flipped=torch.arange(8) >= 4)
    found = corpus(videos=TokenCaches(cache, None, qwen.processor.video_tokenizer))
    assert found.notes == ("1 of 8 clips are left out: mirrored, with left or right in the caption",)
    assert found.summary["tokens"]["clips"] == 7
