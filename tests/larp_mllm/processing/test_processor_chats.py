"""apply_chat_template of the processor: templates, options, unsupported options."""

from larp_mllm.processing.processor import LarpMllmProcessor
from tests.larp_mllm.chat_templates import QWEN3

import pytest
import torch
from transformers import AutoProcessor

CLIPS = torch.rand(3, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
ASKED = [{"role": "user", "content": "a circle"}]


def test_chats_become_ids_or_text_for_display(qwen):
    chat = [
        {"role": "user", "content": [{"type": "video", "video": CLIPS[0]}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "a red circle"},
    ]
    apply = qwen.processor.apply_chat_template
    ids, shown = apply(chat), apply(chat, tokenize=False)
    assert qwen.processor.vocabulary.split(ids)[1] == ("video", qwen.processor.encode_videos(CLIPS[:1])[0])
    assert "<video>What is it?" in shown and shown.index("What is it?") < shown.index("a red circle")
    asked, answered = apply(chat[:1]), apply(chat[:1], add_generation_prompt=True)
    assert len(asked) < len(answered) and answered[: len(asked)] == asked == ids[: len(asked)]
    batch = apply([chat, chat[:1]], padding=True, return_tensors="pt", return_dict=True)
    assert batch["input_ids"].shape[0] == 2 and batch["attention_mask"].sum(1).tolist() == [
        len(ids),
        len(apply(chat[:1])),
    ]
    with pytest.raises(ValueError, match=r"chat 1"):
        apply([chat, [{"role": "user", "content": [{"type": "video"}]}]])


def test_the_chat_template_is_that_of_the_text_tokenizer_and_is_saved_with_it(qwen, tmp_path, monkeypatch):
    apply = qwen.processor.apply_chat_template
    before = apply(ASKED, tokenize=False)
    monkeypatch.setattr(qwen.processor, "chat_template", PLAIN)
    assert qwen.processor.tokenizer.chat_template == PLAIN
    assert apply(ASKED, tokenize=False) == "user: a circle\n" != before
    # Without targets, no turn needs an end token.
    answered = [*ASKED, {"role": "assistant", "content": "a"}]
    assert apply(answered, tokenize=False) == "user: a circle\nassistant: a\n"
    qwen.processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.chat_template == PLAIN and again.apply_chat_template(ASKED) == apply(ASKED)
    own = (again.video_tokenizer, again.vocabulary)
    assert LarpMllmProcessor(again.tokenizer, *own).chat_template == PLAIN
    assert LarpMllmProcessor(again.tokenizer, *own, chat_template=QWEN3).tokenizer.chat_template == QWEN3
    again.chat_template = None
    assert again.apply_chat_template(ASKED, tokenize=False) == before
    with pytest.raises(ValueError, match=r"chat_template must be a template, .*got 3"):
        again.chat_template = 3


def test_thinking_is_off_by_default(qwen, monkeypatch):
    monkeypatch.setattr(qwen.processor, "chat_template", QWEN3)
    options = dict(add_generation_prompt=True, tokenize=False)
    thinking = qwen.processor.apply_chat_template(ASKED, **options, enable_thinking=True)
    assert thinking.endswith("assistant\n")
    assert qwen.processor.apply_chat_template(ASKED, **options) == thinking + "<think>\n\n</think>\n\n"


def test_unsupported_options_are_refused_with_the_remedy(qwen):
    apply = qwen.processor.apply_chat_template
    assert apply(ASKED, tools=None, continue_final_message=False) == apply(ASKED)
    for option, words in {
        "tools": ".*: describe them in a system message",
        "continue_final_message": "an answer is a new message",
        "chat_template": "set processor.chat_template",
        "add_generation_promt": "leave it out",
    }.items():
        with pytest.raises(ValueError, match=f"apply_chat_template does not support {option}: {words}"):
            apply(ASKED, **{option: ["x"]})
