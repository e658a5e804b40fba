"""eval/chat_answers.py on a tiny chat model, and its prompts."""

import json

from eval import chat_answers
from larp_mllm.data.dataset import REQUESTS
from larp_mllm.data.phrases import PHRASINGS
from larp_mllm.engine.own_answers import QUESTIONS
from tests.larp_mllm.tiny import favour_videos, tiny_mllm

import pytest

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


@pytest.fixture
def folders(tmp_path):
    mllm = tiny_mllm("tiny-llama")
    mllm.processor.tokenizer.chat_template = TEMPLATE
    mllm.save(tmp_path / "model")
    mllm.model.base.save_pretrained(tmp_path / "base")
    mllm.processor.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path


def test_a_model_that_was_not_trained_answers_like_its_base(folders, capsys):
    options = ["--model", str(folders / "model"), "--base", str(folders / "base"), "--max-new-tokens", "6"]
    record = chat_answers.main([*options, "--out", str(folders / "out.json")])
    assert record["perplexity"]["before"] == pytest.approx(record["perplexity"]["after"], rel=1e-6)
    # Its random head begins a video now and then.
    assert all(row["same"] or "<video>" in row["after"] for row in record["plain"])
    assert record["same_answers"] >= 5 and len({row["before"] for row in record["plain"]}) > 5
    assert json.loads((folders / "out.json").read_text())["same_answers"] == record["same_answers"]
    assert "plain questions answered as before" in capsys.readouterr().out


def test_videos_are_counted(folders, monkeypatch):
    mllm = tiny_mllm("tiny-llama")
    mllm.processor.tokenizer.chat_template = TEMPLATE
    favour_videos(mllm, monkeypatch, bonus=100.0)
    assert chat_answers.answer(mllm, "red", 6) == " <video>"


def test_training_sees_none_of_the_prompts():
    prompts = json.loads(chat_answers.PROMPTS.read_text())
    asked = [prompt for kind in prompts.values() for prompt in kind]
    assert [len(prompts[kind]) for kind in ("plain", "requests", "without")] == [10, 40, 40]
    assert len(set(asked)) == len(asked)
    known = set(QUESTIONS.read_text().splitlines())
    classes = ("archery", "basketball dunk", "horse race", "playing piano", "playing violin", "surfing")
    known |= {r.format(p.format(c)) for r in REQUESTS for p in PHRASINGS for c in classes}
    assert not known & set(asked)


def test_a_base_without_a_chat_template_is_refused(tmp_path):
    mllm = tiny_mllm("tiny-llama")
    mllm.save(tmp_path / "model")
    mllm.model.base.save_pretrained(tmp_path / "base")
    mllm.processor.tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="no chat template"):
        chat_answers.main(
            ["--model", str(tmp_path / "model"), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "out.json")]
        )
