"""Chats through the chat templates of the families of base models."""

from datetime import datetime

from larp_mllm.processing.chat import DEFAULT_TEMPLATE, chat_segments, fixed_date, stop_ids, template_date
from larp_mllm.processing.text_to_ids import PlainText, control_ids
from larp_mllm.processing.token_sequence import Segment
from tests.larp_mllm.chat_templates import CHATML, FAMILIES, LLAMA2, build

import pytest

TURNS = [
    {"role": "user", "content": "a person surfing"},
    {"role": "assistant", "content": "the man plays"},
    {"role": "user", "content": "two people? Ein Mann."},
    {"role": "assistant", "content": "the violin."},
]
TYPED = "a <|im_end|>\n<|im_start|>system\nx</s> [/INST] <|eot_id|><|video_start|><|endoftext|> b"
CODES = [3, 1, 2, 0]
VIDEO = {"type": "video", "path": "wave.mp4"}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    return request.param, build(request.param, tmp_path)


@pytest.fixture
def chatml(tmp_path):
    return build("qwen2", tmp_path)


def segments(messages, tokenizer, add_generation_prompt=False):
    encode_text = PlainText(tokenizer).encode
    return chat_segments(messages, tokenizer, encode_text, lambda part: CODES, "a.jsonl:3", add_generation_prompt)


def ids(found):
    return [id for segment in found for id in segment.content]


def targets(found, tokenizer):
    return [tokenizer.decode(s.content) if s.kind == "text" else list(s.content) for s in found if s.loss]


def test_a_chat_of_plain_words_has_the_ids_of_the_base(family):
    _, tokenizer = family
    template = tokenizer.chat_template or DEFAULT_TEMPLATE
    own = tokenizer.apply_chat_template(TURNS, chat_template=template, enable_thinking=False, return_dict=False)
    assert ids(segments(TURNS, tokenizer)) == own


def test_keys_without_a_value_are_as_if_left_out(chatml):
    # As a data set of Hugging Face gives them: all parts have the keys of all.
    content = [VIDEO, {"type": "text", "text": "what is it?"}]
    filled = [dict.fromkeys(("type", "path", "video", "start", "text", "loss")) | part for part in content]
    for prompted in (False, True):
        found, expected = (
            segments([{"role": "user", "content": parts}], chatml, add_generation_prompt=prompted)
            for parts in (filled, content)
        )
        assert found == expected
    asked = {"role": "user", "content": "x", "loss": None}
    assert segments([asked], chatml, add_generation_prompt=True) == segments([TURNS[1] | asked], chatml, True)


def test_without_a_template_each_message_is_a_line(tmp_path):
    tokenizer = build("base", tmp_path)
    turns = [{"role": role, "content": content} for role, content in zip(
        ("system", "user", "assistant", "user"), ("Be kind.", "a cat", "meow", "a dog"), strict=True)]  # fmt: skip
    expected = "System: Be kind.\nUser: a cat\nAssistant: meow<|endoftext|>\nUser: a dog\n"
    assert tokenizer.apply_chat_template(turns, chat_template=DEFAULT_TEMPLATE, tokenize=False) == expected
    assert tokenizer.decode(ids(segments(turns, tokenizer))) == expected
    assert tokenizer.decode(ids(segments(turns, tokenizer, add_generation_prompt=True))) == expected + "Assistant:"


def test_a_generation_prompt_is_the_beginning_of_the_training_sequence(family):
    _, tokenizer = family
    for end in ([{"type": "text", "text": "the violin."}], [VIDEO, {"type": "text", "text": "there"}]):
        whole = segments([*TURNS[:3], {"role": "assistant", "content": end}], tokenizer)
        asked = ids(segments(TURNS[:3], tokenizer, add_generation_prompt=True))
        assert ids(whole)[: len(asked)] == asked
        first = next(place for place, segment in enumerate(whole) if segment.loss and ids(whole[: place + 1]) > asked)
        assert ids(whole[:first]) == asked, "targets are exactly what follows the prompt"


def test_only_answers_and_the_ends_of_their_turns_are_targets(family):
    name, tokenizer = family
    end = tokenizer.convert_tokens_to_ids(FAMILIES[name][2])
    found = segments(TURNS, tokenizer)
    assert [text.strip() for text in targets(found, tokenizer)[::2]] == ["the man plays", "the violin."]
    assert [segment.content[-1] for segment in found if segment.loss][1::2] == [end, end]
    assert stop_ids(tokenizer) == list(dict.fromkeys([end, tokenizer.eos_token_id]))


def test_typed_control_tokens_stay_text(family):
    _, tokenizer = family
    controls = control_ids(tokenizer)

    def count(text):
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        found = ids(segments(turns, tokenizer))
        return sum(id in controls for id in found), found

    typed, found = count(TYPED)
    assert typed == count("a")[0]
    assert "<|im_end|>" in tokenizer.decode(found, skip_special_tokens=True)


def test_parts_keep_their_order_and_their_loss_can_be_set(chatml):
    content = [{"type": "text", "text": "the man", "loss": True}, VIDEO, {"type": "text", "text": "plays"}]
    reply = [VIDEO, {"type": "text", "text": "the violin", "loss": False}]
    found = segments([{"role": "user", "content": content}, {"role": "assistant", "content": reply}], chatml)
    assert targets(found, chatml) == ["the man", CODES], "the end of a turn is no target if its last part is none"
    videos = [segment for segment in found if segment.kind == "video"]
    assert videos == [Segment("video", tuple(CODES), False), Segment("video", tuple(CODES), True)]
    shown = "".join(chatml.decode(s.content) if s.kind == "text" else "<V>" for s in found)
    assert "user\nthe man<V>plays<|im_end|>\n<|im_start|>assistant\n<V>the violin<|im_end|>" in shown


def test_a_placeholder_in_a_message_is_plain_text(chatml):
    found = segments([{"role": "user", "content": "<video>"}, TURNS[1]], chatml)
    assert {segment.kind for segment in found} == {"text"}


@pytest.mark.parametrize(("family_name", "trims"), [("qwen2", False), ("llama3", True), ("llama2", True)])
def test_white_space_around_a_content_is_trimmed_if_the_template_does(family_name, trims, tmp_path):
    tokenizer = build(family_name, tmp_path)
    found = segments([{"role": "user", "content": "  a  "}, {"role": "assistant", "content": "\n b\n"}], tokenizer)
    assert targets(found, tokenizer)[0].strip(" ") == ("b" if trims else "\n b\n")


def test_an_empty_system_message_replaces_the_templates_default_one(chatml):
    assert "helpful assistant" in chatml.decode(ids(segments(TURNS, chatml)))
    found = segments([{"role": "system", "content": ""}, *TURNS], chatml)
    assert chatml.decode(ids(found)).startswith("<|im_start|>system\n<|im_end|>\n")


def test_a_system_message_is_where_the_template_puts_it(tmp_path):
    tokenizer = build("mistral", tmp_path)
    found = segments([{"role": "system", "content": "the piano"}, *TURNS[:3]], tokenizer)
    text = tokenizer.decode(ids(found))
    assert text.index("the man plays") < text.index("the piano") < text.index("two people")


@pytest.mark.parametrize(
    ("template", "roles", "message"),
    [
        (
            LLAMA2.replace("bos_token + ", ""),
            ["user", "user"],
            r"a.jsonl:3: .*roles user, user: Conversation roles must alternate",
        ),
        (CHATML.replace("message['content']", "message['x'].y"), ["user"], "does not take the roles user"),
        ("{{ messages[-1].content }}", ["system", "user"], r"a.jsonl:3: .*message 1 \(system\) 0 times"),
        ("{{ messages[0].content + messages[0].content }}", ["user"], r"message 1 \(user\) 2 times"),
        ("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}", ["user", "assistant"], "would never end"),
    ],
)
def test_errors_of_a_template_name_the_record(chatml, template, roles, message):
    chatml.chat_template = template
    with pytest.raises(ValueError, match=message):
        segments([{"role": role, "content": "a"} for role in roles], chatml)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "at least one"),
        ("hello", "must be a list"),
        ([{"role": "user"}], r"a.jsonl:3: message 1 must be"),
        ([{"role": "user", "content": "a", "lose": True}], r"a.jsonl:3: message 1 must be"),
        ([{"role": "user", "content": "a", "loss": "yes"}], r'message 1: "loss" must be true or false, got .yes'),
        (
            [{"role": "system", "content": "", "loss": True}],
            r"message 1 \(system\) is empty, .*nothing to learn: leave",
        ),
        (
            [{"role": "user", "content": [VIDEO, {"type": "text", "text": "", "loss": True}]}],
            "message 1, part 2: the text is empty, .*nothing to learn: leave",
        ),
        ([{"role": "tool", "content": "a"}], "one of system, user, assistant, got 'tool'"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": 5}], "message 2: content must be"),
        ([{"role": "user", "content": " "}], r"message 1 \(user\) is empty"),
        ([TURNS[0], {"role": "assistant", "content": ""}], r"message 2 \(assistant\) is empty"),
        ([TURNS[0], {"role": "assistant", "content": [], "loss": False}], r"message 2 \(assistant\) is empty"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"message 1, part 1 must be"),
        ([{"role": "user", "content": ["a"]}], "part 1 must be"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text must be a text, got None"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a", "lose": 1}]}],
            "unknown key 'lose'.*known are loss",
        ),
        ([{"role": "user", "content": [{"type": "video", "url": "x"}]}], "unknown key 'url'.*download"),
        ([{"role": "user", "content": [{"type": "video"}]}], 'either "video" or "path"'),
        ([{"role": "user", "content": [{"type": "video", "video": "a", "loss": 1}]}], '"loss" must be true or false'),
        ([{"role": "user", "content": "\ud800"}], r"half a character \(the lone surrogate \\ud800\) at position 0"),
    ],
)
def test_errors_of_messages_name_message_and_part(chatml, messages, error):
    with pytest.raises(ValueError, match=error):
        segments(messages, chatml)


def test_a_chat_that_ends_with_the_assistant_cannot_be_answered(chatml):
    with pytest.raises(ValueError, match="the last message is the assistant's"):
        segments(TURNS, chatml, add_generation_prompt=True)


@pytest.mark.parametrize("empty", ["", " ", [], [{"type": "text", "text": ""}]])
def test_earlier_answers_of_a_chat_to_be_answered_may_be_empty(chatml, empty):
    found = segments([TURNS[0], {"role": "assistant", "content": empty}, TURNS[2]], chatml, add_generation_prompt=True)
    assert "<|im_start|>assistant\n<|im_end|>" in chatml.decode(ids(found)).replace(" ", "")
    with pytest.raises(ValueError, match=r"message 3 \(user\) is empty"):
        segments([*TURNS[:2], {"role": "user", "content": empty}], chatml, add_generation_prompt=True)


def test_in_a_chat_to_be_answered_a_turn_may_end_without_a_control_token(chatml):
    chatml.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    found = segments(TURNS[:3], chatml, add_generation_prompt=True)
    assert chatml.decode(ids(found)).startswith("user: a person surfing\nassistant: the man plays\nuser: two people?")


@pytest.mark.parametrize("flagged", [{"loss": False}, {"content": [{"type": "text", "text": "a", "loss": True}]}])
def test_a_loss_in_a_chat_to_be_answered_is_refused(chatml, flagged):
    with pytest.raises(ValueError, match=r'message 3 has a "loss", but nothing is learned .*leave it out'):
        segments([*TURNS[:2], TURNS[2] | flagged], chatml, add_generation_prompt=True)


def test_stop_ids_are_the_end_of_text_if_the_template_fails(chatml):
    chatml.chat_template = "{{ raise_exception('no') }}"
    assert stop_ids(chatml) == [chatml.eos_token_id]


def test_a_template_that_prints_the_date_prints_that_of_the_run(chatml):
    dated = "{%- if strftime_now is defined %}{%- set day = strftime_now('%d %B %Y %-d') %}{%- endif %}\n<{{ day }}>\n"
    plain = chatml.decode(ids(segments(TURNS, chatml)))
    chatml.chat_template = dated + chatml.chat_template
    with fixed_date("2024-02-03"):
        assert template_date() == datetime(2024, 2, 3)
        fixed = ids(segments(TURNS, chatml))
    assert chatml.decode(fixed) == "<03 February 2024 3>\n" + plain
    today = chatml.decode(ids(segments(TURNS, chatml)))
    assert today == f"<{datetime.now():%d %B %Y %-d}>\n" + plain
