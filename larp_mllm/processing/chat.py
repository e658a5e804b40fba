"""Chats -> segments, through the text tokenizer's own chat template.

The template is rendered with unguessable placeholders, which are then replaced by the contents, encoded separately. No
content can therefore become a control token. The template does not see the contents: white space that it trims is
trimmed here, but `<think>` blocks of earlier answers stay.
"""

import re
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from larp_mllm.checks import check_encodable
from larp_mllm.processing.text_to_ids import control_ids
from larp_mllm.processing.token_sequence import Segment

ROLES = ("system", "user", "assistant")

# For tokenizers without a chat template, such as those of base models.
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}"
    # An expression, since transformers renders with trim_blocks, which removes a line break after a tag.
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)

_DATE: ContextVar[datetime | None] = ContextVar("date of chat templates", default=None)
_DATE_CODES = ("-d", "-m", *"aAbBdejmUuwyYHIMpS")
_PART_KEYS = {"text": {"type", "text", "loss"}, "video": {"type", "video", "path", "start", "loss"}}
# White space around the placeholders: if rendering removes it, the template trims contents.
_EDGE = "\v"
_SECRET = secrets.token_hex(16)
_PLACEHOLDER = re.compile(rf"X{_SECRET}N(\d+)X")


@dataclass(frozen=True)
class Part:
    """A text, or a video (`text` is None), of a message; `given`: the part as in the message; `loss`: whether it is a target."""

    text: str | None
    given: dict[str, Any]
    loss: bool


def chat_segments(
    messages: Any,
    tokenizer,
    encode_text: Callable[[str], list[int]],
    codes_of: Callable[[dict], Iterable[int]],
    where: str = "messages",
    add_generation_prompt: bool = False,
    assistant_loss: bool = True,
    enable_thinking: bool = False,
) -> list[Segment]:
    """A chat -> segments, for `encode` with add_special_tokens=False, since the template has its own.

    Args:
        messages: `{"role": "system"|"user"|"assistant", "content": text or parts}` in order; a part is `{"type": "text",
            "text": ...}` or `{"type": "video", "video" or "path": ...}`. A boolean "loss" of a part, else of its message,
            says whether it is a target; by default the assistant's are. The token that ends a turn of the assistant is
            a target if the last part is.
        tokenizer: of transformers; without a chat template, DEFAULT_TEMPLATE is used.
        encode_text: text -> text ids, none of them a control token (LarpMllmProcessor.encode_text).
        codes_of: a part of type video -> its N codes.
        where: name of the chat in errors.
        add_generation_prompt: end with the template's beginning of an answer. The chat then has no targets.
        assistant_loss: whether parts of the assistant are targets by default. If not, its messages may be empty, and its
            turns may end without a control token.
        enable_thinking: passed to the template.

    Raises ValueError for messages of another form, a "loss" of an empty part or of a chat to be answered, and a template
    that refuses the roles, omits or repeats a message, or ends a target turn without a control token.
    """
    assistant_loss = assistant_loss and not add_generation_prompt
    turns = chat_parts(messages, where, assistant_loss, allow_empty_answers=not assistant_loss)
    roles = [message["role"] for message in messages]
    if add_generation_prompt:
        _check_answerable(messages, where)
    rendered = _render(roles, tokenizer, where, add_generation_prompt, enable_thinking)
    pieces, controls = _Pieces(tokenizer, encode_text), control_ids(tokenizer)
    segments: list[Segment] = []
    end_is_target = False
    for template, number in zip(rendered.pieces, [*rendered.order, None], strict=True):
        parts = [] if number is None else _trimmed(turns[number], rendered.trims[number])
        # Tokenizers encode a word together with the space before it.
        space = " " if template.endswith(" ") and (add_generation_prompt if number is None else parts) else ""
        ids = pieces.template(template.removesuffix(space))
        segments += _turn_end(ids, controls, where) if end_is_target else [Segment("text", ids, False)]
        for part in parts:
            if part.text is None:
                segments.append(Segment("video", tuple(codes_of(part.given)), part.loss))
            else:
                segments.append(Segment("text", pieces.content(space + part.text), part.loss))
            space = ""
        end_is_target = bool(parts) and roles[number] == "assistant" and parts[-1].loss
    return [segment for segment in segments if segment.content]


def chat_parts(
    messages: Any, where: str, assistant_loss: bool = True, allow_empty_answers: bool = False
) -> list[list[Part]]:
    """Check messages and return the texts and videos of each.

    assistant_loss: whether parts of the assistant are targets by default. allow_empty_answers: whether its messages may
    be empty. Raises ValueError, naming `where` and the message.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(
            f'{where}: "messages" must be a list of at least one {{"role", "content"}}, got {_brief(messages)}'
        )
    return [
        _message_parts(message, assistant_loss, allow_empty_answers, f"{where}: message {number}")
        for number, message in enumerate(messages, 1)
    ]


def template_date() -> datetime:
    """The date that chat templates print: that of `fixed_date`, else now."""
    return _DATE.get() or datetime.now()


@contextmanager
def fixed_date(date: str) -> Iterator[None]:
    """In the block, chat templates print this date, such as "2026-11-27", so that the ids of a chat stay the same."""
    token = _DATE.set(datetime.fromisoformat(date))
    try:
        yield
    finally:
        _DATE.reset(token)


def stop_ids(tokenizer) -> list[int]:
    """The ids that end a turn of the assistant: the chat template's end of turn, and the end of text."""
    found = []
    try:
        after = _render(["user", "assistant"], tokenizer, "stop_ids", False).pieces[-1]
        controls = control_ids(tokenizer)
        found = [i for i in tokenizer(after, add_special_tokens=False)["input_ids"] if i in controls][:1]
    except ValueError:  # the template refuses these roles; the end of text remains
        pass
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys(found + eos))


# Messages


def _message_parts(message: Any, assistant_loss: bool, allow_empty_answers: bool, where: str) -> list[Part]:
    message = _given(message)
    if not isinstance(message, dict) or set(message) - {"loss"} != {"role", "content"}:
        raise ValueError(
            f'{where} must be {{"role": ..., "content": ...}}, optionally with "loss", got {_brief(message)}'
        )
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"{where}: the role must be one of {', '.join(ROLES)}, got {_brief(role)}")
    loss = check_loss(message, assistant_loss and role == "assistant", where)
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise ValueError(f"{where}: content must be a text, or a list of text and video parts, got {_brief(content)}")
    parts = [_part(part, loss, f"{where}, part {number}") for number, part in enumerate(content, 1)]
    if message.get("loss") and not any(part.text != "" for part in parts):
        raise ValueError(f'{where} ({role}) is empty, and "loss": true has nothing to learn: leave it out')
    # An empty system message replaces the template's default one.
    may_be_empty = role == "system" or (role == "assistant" and allow_empty_answers)
    if not may_be_empty and not any(part.text is None or part.text.strip() for part in parts):
        raise ValueError(f"{where} ({role}) is empty: give it a text or a video, or leave it out")
    return [part for part in parts if part.text != ""]


def _given(fields: Any) -> Any:
    # A data set of Hugging Face gives every part the keys of all, with None.
    return {key: value for key, value in fields.items() if value is not None} if isinstance(fields, dict) else fields


def _part(part: Any, default_loss: bool, where: str) -> Part:
    part = _given(part)
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "video"):
        raise ValueError(
            f'{where} must be {{"type": "text", "text": ...}} or {{"type": "video", "video": ...}}, got {_brief(part)}'
        )
    if unknown := sorted(map(str, set(part) - _PART_KEYS[kind])):
        remedy = "download the video and name the file" if "url" in unknown else f"known are {_known(kind)}"
        raise ValueError(f"{where}: unknown key {unknown[0]!r} in a {kind} part: {remedy}")
    loss = check_loss(part, default_loss, where)
    if kind == "text":
        text = check_text(part.get("text"), f"{where}: text")
        if part.get("loss") and not text:
            raise ValueError(f'{where}: the text is empty, and "loss": true has nothing to learn: leave the part out')
        return Part(text, part, loss)
    if ("video" in part) == ("path" in part):
        raise ValueError(f'{where}: a video part has either "video" or "path", got {_brief(part)}')
    return Part(None, part, loss)


def _check_answerable(messages: Any, where: str) -> None:
    """Raise ValueError if the last of the checked messages is the assistant's, or one has a "loss"."""
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{where}: the last message is the assistant's, there is nothing to answer: add a user's")
    for number, message in enumerate(messages, 1):
        parts = [] if isinstance(message["content"], str) else message["content"]
        if any(given.get("loss") is not None for given in (message, *parts)):
            raise ValueError(
                f'{where}: message {number} has a "loss", but nothing is learned of a chat that is answered: leave it out'
            )


def check_loss(given: dict, default: bool, where: str) -> bool:
    """The "loss" of a record, message or part, else `default`. Raises ValueError unless it is true or false."""
    loss = given.get("loss", default)
    if not isinstance(loss, bool):
        raise ValueError(f'{where}: "loss" must be true or false, got {_brief(loss)}')
    return loss


def check_text(text: Any, where: str) -> str:
    """`text`. Raises ValueError for another type and for a lone surrogate, which no tokenizer can encode."""
    if not isinstance(text, str):
        raise ValueError(f"{where} must be a text, got {_brief(text)}")
    check_encodable(text, where)
    return text


def _trimmed(parts: list[Part], trims: tuple[bool, bool]) -> list[Part]:
    """The parts without the white space at both ends that the template trims."""
    texts = [part.text for part in parts]
    if trims[0] and texts and texts[0] is not None:
        texts[0] = texts[0].lstrip()
    if trims[1] and texts and texts[-1] is not None:
        texts[-1] = texts[-1].rstrip()
    return [Part(text, part.given, part.loss) for text, part in zip(texts, parts, strict=True)]


def _known(kind: str) -> str:
    return ", ".join(sorted(_PART_KEYS[kind]))


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# The template


@dataclass(frozen=True)
class _Rendered:
    pieces: list[str]
    """The template's own text before, between and after the contents."""
    order: list[int]
    """The message of each content; some templates move the system message."""
    trims: dict[int, tuple[bool, bool]]
    """For each message, whether white space before and after its content is trimmed."""


def _render(
    roles: list[str], tokenizer, where: str, add_generation_prompt: bool, enable_thinking: bool = False
) -> _Rendered:
    chat = [{"role": role, "content": f"{_EDGE}X{_SECRET}N{number}X{_EDGE}"} for number, role in enumerate(roles)]
    template = _dated(tokenizer.get_chat_template()) if tokenizer.chat_template else DEFAULT_TEMPLATE
    try:
        # Thinking is off by default, since training targets are answers alone. Templates without it ignore the option.
        text = tokenizer.apply_chat_template(
            chat,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=enable_thinking,
        )
    except Exception as error:  # jinja and templates raise classes of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"{where}: the chat template of the text tokenizer does not take the roles {', '.join(roles)}: {reason}. Give "
            "roles that it knows in the order it requires, or set another chat_template"
        ) from error
    split = _PLACEHOLDER.split(text)
    pieces, order = split[::2], [int(number) for number in split[1::2]]
    for number, role in enumerate(roles):
        if order.count(number) != 1:
            raise ValueError(
                f"{where}: the chat template of the text tokenizer shows message {number + 1} ({role}) "
                f"{order.count(number)} times instead of once: leave that message out, or set another chat_template"
            )
    trims = {
        number: (not pieces[place].endswith(_EDGE), not pieces[place + 1].startswith(_EDGE))
        for place, number in enumerate(order)
    }
    return _Rendered([piece.strip(_EDGE) for piece in pieces], order, trims)


def _dated(template: str) -> str:
    """`template` with the date of `fixed_date`, if there is one and it prints the date."""
    if (date := _DATE.get()) is None or "strftime_now" not in template:
        return template
    # A macro in place of transformers' function of this name, since templates get no functions from a caller.
    replaced = "".join(f"|replace('%{code}','{date.strftime(f'%{code}')}')" for code in _DATE_CODES)
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{template}"


def _turn_end(ids: tuple[int, ...], controls: Collection[int], where: str) -> list[Segment]:
    """The template's text after a target answer: a target up to the token that ends the turn."""
    end = next((place + 1 for place, id in enumerate(ids) if id in controls), None)
    if end is None:
        raise ValueError(
            f"{where}: the chat template of the text tokenizer ends the assistant's turn without a control token, so that "
            'an answer would never end: set another chat_template, or "loss": false for its last part'
        )
    return [Segment("text", ids[:end], True), Segment("text", ids[end:], False)]


class _Pieces:
    """Encodes the pieces of a chat to the ids of the whole, as far as the tokenizer allows.

    Tokenizers of the sentencepiece family put a space before every text, which only the first piece of a chat should
    have. Other pieces are encoded after a line break, which is then removed.
    """

    def __init__(self, tokenizer, encode_text: Callable[[str], list[int]]):
        self._template = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        self._content = encode_text
        self._spaced = encode_text("\na") != encode_text("\n") + encode_text("a")
        self._first = True

    def template(self, text: str) -> tuple[int, ...]:
        """Encode a piece of the template, with its control tokens."""
        return self._encode(self._template, text)

    def content(self, text: str) -> tuple[int, ...]:
        """Encode a piece of content, without control tokens."""
        return self._encode(self._content, text)

    def _encode(self, encode: Callable[[str], list[int]], text: str) -> tuple[int, ...]:
        if not text:
            return ()
        first, self._first = self._first, False
        if self._spaced and not first:
            prefix, whole = encode("\n"), encode("\n" + text)
            if whole[: len(prefix)] == prefix:
                return tuple(whole[len(prefix) :])
        return tuple(encode(text))
