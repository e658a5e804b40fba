"""Segments of text and video -> ids and labels; tokens are inserted as ids, never as strings."""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Literal

from larp_mllm.model.vocabulary import IGNORE, Vocabulary

import torch
from torch import Tensor

PLACEHOLDER = "<video>"


@dataclass(frozen=True)
class Segment:
    """A piece of text (`content`: text ids) or a video (`content`: N codes); `loss`: whether it is a target of training."""

    kind: Literal["text", "video"]
    content: tuple[int, ...]
    loss: bool


@dataclass(frozen=True)
class TokenSequence:
    """ids and labels, int64 (S,). Labels are ids or -100, aligned with ids; the model shifts them."""

    ids: Tensor
    labels: Tensor

    @property
    def targets(self) -> int:
        """The number of targets. The first id is never one, since nothing precedes it."""
        return int((self.labels[1:] != IGNORE).sum())


@dataclass(frozen=True)
class Layout:
    """The id layout with the begin and end ids of the base's text tokenizer (None: it has none)."""

    vocabulary: Vocabulary
    bos: int | None
    eos: int | None

    def prompt(self, text: SequenceOf[int]) -> list[int]:
        """The prompt of text to video; an empty text gives the unconditional prompt of guidance."""
        return [*self._begin(), *text, self.vocabulary.video_start]

    def question(self, codes: SequenceOf[int]) -> list[int]:
        """The prompt of video to text."""
        return [*self._begin(), *self.vocabulary.span(codes)]

    def continuation(self, text: SequenceOf[int], given: SequenceOf[int]) -> list[int]:
        """The prompt of continuation; `given`: the codes of the given frames."""
        return [*self._begin(), *text, *self.vocabulary.span(given), self.vocabulary.video_start]

    def _begin(self) -> list[int]:
        return [] if self.bos is None else [self.bos]


def encode(segments: SequenceOf[Segment], layout: Layout, add_special_tokens: bool = True) -> TokenSequence:
    """Segments -> begin id, the segments in order, end id; chats have their own begin and end (add_special_tokens=False).

    Targets are:
    - the contents of segments with `loss`;
    - the video_start of a segment with `loss` after a text or such a video: the decision to show a video;
    - the end id after a last text with `loss`, or if all segments have `loss`.
    video_end is never a target, since it always follows the N-th code. Nor is the end id after the video of a given
    text: `generate` stops there anyway, and the model would learn to end where `describe` expects a caption.
    """
    ids: list[int] = layout._begin() if add_special_tokens else []
    labels: list[int] = [IGNORE] * len(ids)
    start_is_target = False
    for segment in segments:
        if segment.kind == "text":
            ids += segment.content
            labels += segment.content if segment.loss else [IGNORE] * len(segment.content)
            start_is_target = bool(segment.content)
            continue
        span = layout.vocabulary.span(segment.content)
        ids += span
        start = span[0] if segment.loss and start_is_target else IGNORE
        labels += [start, *(span[1:-1] if segment.loss else [IGNORE] * (len(span) - 2)), IGNORE]
        start_is_target = segment.loss
    if add_special_tokens and layout.eos is not None:
        ids.append(layout.eos)
        last = segments[-1] if segments else None
        ended = last is not None and last.loss and (last.kind == "text" or all(segment.loss for segment in segments))
        labels.append(layout.eos if ended else IGNORE)
    return TokenSequence(torch.tensor(ids, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64))


def text_to_video(text: SequenceOf[int], codes: SequenceOf[int]) -> list[Segment]:
    """A caption, then its video as target. An empty caption gives an unconditional sequence."""
    return [Segment("text", tuple(text), loss=False), Segment("video", tuple(codes), loss=True)]


def video_to_text(text: SequenceOf[int], codes: SequenceOf[int]) -> list[Segment]:
    """A video, then its caption as target."""
    return [Segment("video", tuple(codes), loss=False), Segment("text", tuple(text), loss=True)]


def continuation(text: SequenceOf[int], given: SequenceOf[int], codes: SequenceOf[int]) -> list[Segment]:
    """A text (may be empty) and the codes of the given frames, then the codes of the whole clip as target.

    The clip's video_start is no target, since `continue_video` inserts it.
    """
    return [
        Segment("text", tuple(text), loss=False),
        Segment("video", tuple(given), False),
        *text_to_video([], codes)[1:],
    ]


def interleaved(
    text: str,
    videos: SequenceOf[tuple[SequenceOf[int], bool]],
    encode_text: Callable[[str], list[int]],
    loss: bool = True,
    where: str = "record",
) -> list[Segment]:
    """`"before <video> after"` and (codes, loss) of each video -> segments. `loss` applies to the text.

    Raises ValueError, naming `where`, if the numbers of placeholders and videos differ.
    """
    pieces = text.split(PLACEHOLDER)
    check_placeholders(len(pieces) - 1, len(videos), where)
    segments = []
    for number, piece in enumerate(pieces):
        if piece:
            segments.append(Segment("text", tuple(encode_text(piece)), loss))
        if number < len(videos):
            codes, video_loss = videos[number]
            segments.append(Segment("video", tuple(codes), video_loss))
    return segments


def check_placeholders(placeholders: int, videos: int, where: str) -> None:
    """Raise ValueError unless there is one video for each placeholder."""
    if placeholders != videos:
        remedy = f"add {PLACEHOLDER} where a video stands" if videos > placeholders else "name the missing videos"
        raise ValueError(
            f"{where}: the text has {placeholders} {PLACEHOLDER} placeholders but {videos} videos: {remedy}, one for each"
        )


def check_length(length: int, positions: int, where: str, remedy: str = "shorten the text") -> None:
    """Raise ValueError if `length` ids exceed the `positions` of a model; nothing is truncated."""
    if length > positions:
        raise ValueError(f"{where}: {length} ids, but the base model has {positions} positions: {remedy}")
