"""The base's own answers to plain questions as training data."""

import copy
import json

from larp.engine import signals
from larp_mllm.data.dataset import REQUESTS, TASKS, Tasks, TrainingMix
from larp_mllm.engine import own_answers as module
from larp_mllm.engine import results
from larp_mllm.engine.own_answers import QUESTIONS, own_answers
from larp_mllm.engine.video_start import fit_video_start
from larp_mllm.generation.sampling import TextSampling
from larp_mllm.model.vocabulary import IGNORE
from larp_mllm.processing.chat import DEFAULT_TEMPLATE
from tests.larp_mllm.tiny import CAPTIONS

import pytest
import torch


@pytest.fixture
def chatting(qwen, monkeypatch, tmp_path):
    """A model with a chat template and five questions."""
    mllm = copy.copy(qwen)
    mllm.processor = copy.copy(qwen.processor)
    mllm.processor.tokenizer = copy.deepcopy(qwen.processor.tokenizer)
    mllm.processor.tokenizer.chat_template = DEFAULT_TEMPLATE
    questions, openings = tmp_path / "questions.txt", tmp_path / "openings.txt"
    openings.write_text("a circle\nthe\n")
    monkeypatch.setattr(module, "OPENINGS", openings)
    questions.write_text("a red circle\na blue square moving\nred\na\nleft\n")
    monkeypatch.setattr(module, "QUESTIONS", questions)
    monkeypatch.setattr(module, "_BATCH", 2)
    monkeypatch.setattr(module, "_ANSWER", TextSampling(max_new_tokens=12))
    return mllm


def test_the_answers_are_those_that_the_base_gives_in_a_chat(chatting, tmp_path):
    records = own_answers(chatting, tmp_path / "run")
    (path,) = (tmp_path / "run").glob("own-answers-*.jsonl")
    written = [json.loads(line) for line in path.read_text().splitlines()]
    chats = [record["messages"] for record in written if "messages" in record]
    assert len(records) == len(written) and chats
    for question, answer in chats:
        said = chatting.chat([question], text_sampling=TextSampling(max_new_tokens=12), max_videos=0)["content"]
        said = said if isinstance(said, str) else "".join(part["text"] for part in said)
        parts = answer["content"]
        given = parts if isinstance(parts, str) else "".join(part["text"] for part in parts)
        assert given.strip() == said.strip()


def test_prose_begins_with_an_opening_and_ends_with_a_sentence(chatting, monkeypatch):
    said = iter(["blue. And then", "red without an end", "<video> red. ", "left! Yes?"])
    ids = lambda text: chatting.processor.encode_text(text)  # noqa: E731
    monkeypatch.setattr(module, "decode_text", lambda model, rows, *_: [ids(f" {next(said)}") for _ in rows])
    written = [record["text"] for record in module._prose(chatting, ["a circle", "the"])]
    assert written == ["a circle blue.", "the left! Yes?"]


def test_a_stop_ends_the_asking_and_leaves_no_file(chatting, tmp_path, monkeypatch):
    decode = module.decode_text
    monkeypatch.setattr(module, "decode_text", lambda *args: (signals._requested.set(), decode(*args))[1])
    try:
        with pytest.raises(KeyboardInterrupt):
            own_answers(chatting, tmp_path / "run")
    finally:
        signals._requested.clear()
    assert not list(tmp_path.glob("run/*.jsonl"))


def test_no_end_is_learned_of_an_answer_that_was_cut_off():
    assert module._message("yes it is", True)["content"] == "yes it is"
    learned, rest = module._message("yes it is", False)["content"]
    assert (learned["text"], rest["text"], rest["loss"]) == ("yes it", " is", False)


def test_answers_are_asked_for_once(chatting, tmp_path, monkeypatch):
    first = own_answers(chatting, tmp_path)
    monkeypatch.setattr(module, "decode_text", lambda *_: pytest.fail("asked again"))
    again = own_answers(chatting, tmp_path)
    assert all(a.ids.equal(b.ids) and a.labels.equal(b.labels) for a, b in zip(first, again, strict=True))


def test_another_base_or_template_is_asked_anew(chatting, tmp_path, monkeypatch):
    said = chatting.processor.encode_text(" red.")
    monkeypatch.setattr(module, "decode_text", lambda model, rows, *_: [said for _ in rows])

    def files():
        own_answers(chatting, tmp_path / "run")
        return len(list(tmp_path.glob("run/own-answers-*.jsonl")))

    assert (files(), files()) == (1, 1)
    chatting.model = copy.deepcopy(chatting.model)  # shared with other tests
    next(iter(chatting.model.base.parameters())).data.mul_(2)
    assert (files(), files()) == (2, 2)
    chatting.processor.tokenizer.chat_template = f"{DEFAULT_TEMPLATE} "
    assert files() == 3


def test_answers_that_are_longer_than_a_packed_row_are_refused_before_training(chatting, tmp_path):
    longest = max(len(record.ids) for record in own_answers(chatting, tmp_path))
    assert len(own_answers(chatting, tmp_path, longest)) > 0
    with pytest.raises(
        ValueError, match=rf"own answers .*own-answers-\w+.jsonl\) has {longest} ids, .*raise it to {longest}"
    ):
        own_answers(chatting, tmp_path, longest - 1)


def test_a_base_without_a_chat_template_is_not_asked(qwen, tmp_path):
    assert not qwen.processor.tokenizer.chat_template
    assert own_answers(qwen, tmp_path / "run") is None
    assert not list(tmp_path.glob("run/*.jsonl"))


def test_the_mix_samples_them(chatting, tmp_path):
    records = own_answers(chatting, tmp_path / "run")
    mix = TrainingMix(Tasks(**dict.fromkeys(TASKS, 0.0) | {"own_answers": 1.0}), own_answers=records)
    known = {tuple(record.ids.tolist()) for record in records}
    batch = mix.batch(0, 20, 0)
    assert {tuple(sequence.ids.tolist()) for sequence in batch} <= known
    assert all((sequence.labels != IGNORE).any() for sequence in batch)


def test_no_question_of_the_package_is_a_request_for_a_video():
    questions = QUESTIONS.read_text(encoding="utf-8").splitlines()
    assert len(set(questions)) == len(questions) > 200
    starts = tuple(request.partition("{}")[0] for request in REQUESTS if request != "{}")
    assert not [question for question in questions if question.startswith(starts)]


def test_a_pretrained_base_trains_on_its_answers(base, train, tmp_path, monkeypatch, chatting):
    tokenizer = chatting.processor.tokenizer
    folder = tmp_path / "base"
    chatting.model.base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report = train(tmp_path / "run", "--base", str(folder), "--align.steps", "1", "--joint.steps", "2")
    assert report["tasks"]["own_answers"] == pytest.approx(0.2 / 1.1)
    assert len(list(tmp_path.glob("run/own-answers-*.jsonl"))) == 1
    report = train(
        tmp_path / "off", "--base", str(folder), "--align.steps", "1", "--joint.steps", "2", "--tasks.own-answers", "0"
    )
    assert "own_answers" not in report["tasks"] and not list(tmp_path.glob("off/own-answers-*"))


@torch.no_grad()
def test_requests_get_a_video_and_own_answers_none(chatting, tmp_path):
    chatting.model = copy.deepcopy(chatting.model)  # shared with other tests
    answers, captions = own_answers(chatting, tmp_path / "run"), {"a red circle", "a blue square moving"}
    before = chatting.model.adapter.control_output.weight.clone()
    fit_video_start(chatting, answers, captions)
    after = chatting.model.adapter.control_output.weight
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    start, wrong = chatting.model.vocabulary.video_start, 0
    for form in REQUESTS:
        for caption in captions:
            prompt = chatting.chat_prompt([{"role": "user", "content": form.format(caption)}])
            logits = chatting.model.text_logits(
                chatting.model.run_base(torch.tensor([prompt])).last_hidden_state[0, -1]
            )
            wrong += int(logits.argmax() != start)
    places = 0
    for answer in answers:
        logits = chatting.model.text_logits(chatting.model.run_base(answer.ids[None]).last_hidden_state[0, :-1])
        wanted = answer.labels[1:] != IGNORE
        wrong += int((logits.argmax(-1) == start)[wanted].sum())
        places += int(wanted.sum())
    # The hidden states of a tiny random base are hardly separable by one row, those of a trained one are.
    assert wrong < 0.2 * (places + 2 * len(REQUESTS))


@pytest.mark.parametrize("method", ["partial-lora", "lora"])
def test_a_training_fits_the_row_where_text_is_left_to_the_base(method, chatting, train, tmp_path, monkeypatch):
    chatting.model.base.save_pretrained(tmp_path / "base")
    chatting.processor.tokenizer.save_pretrained(tmp_path / "base")
    captions = []
    monkeypatch.setattr(results, "fit_video_start", lambda mllm, answers, texts: captions.extend(texts))
    steps = ["--align.steps", "0", "--joint.steps", "2"]
    train(tmp_path / "run", "--base", str(tmp_path / "base"), *steps, "--joint.method", method)
    assert (set(captions) == set(CAPTIONS)) == (method == "partial-lora")
