"""Segments of text and video <-> ids and labels. Pure: no files, no model, no strings that stand for tokens."""

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
    """A stretch of text (`content`: text ids) or one video (`content`: its N codes), and whether it is learned."""

    kind: Literal["text", "video"]
    content: tuple[int, ...]
    loss: bool


@dataclass(frozen=True)
class TokenSequence:
    """ids and labels, int64 (S,); labels are ids or -100, aligned with ids (the model shifts them)."""

    ids: Tensor
    labels: Tensor

    @property
    def targets(self) -> int:
        """How many positions are scored; the first id is never one, nothing precedes it."""
        return int((self.labels[1:] != IGNORE).sum())


@dataclass(frozen=True)
class Layout:
    """What stands around the segments: the id layout, and the base tokenizer's begin and end ids (None: none)."""

    vocabulary: Vocabulary
    bos: int | None
    eos: int | None

    def prompt(self, text: SequenceOf[int]) -> list[int]:
        """The ids after which the first code is sampled; an empty text gives the unconditional prompt of guidance."""
        return [*self._begin(), *text, self.vocabulary.video_start]

    def question(self, codes: SequenceOf[int]) -> list[int]:
        """The ids after which the caption of a video is sampled."""
        return [*self._begin(), *self.vocabulary.span(codes)]

    def continuation(self, text: SequenceOf[int], given: SequenceOf[int]) -> list[int]:
        """The ids after which the first code of a clip is sampled that begins with the frames whose codes are `given`."""
        return [*self._begin(), *text, *self.vocabulary.span(given), self.vocabulary.video_start]

    def _begin(self) -> list[int]:
        return [] if self.bos is None else [self.bos]


def encode(segments: SequenceOf[Segment], layout: Layout, framed: bool = True) -> TokenSequence:
    """Segments in order -> begin id, the segments, end id; without the two ids if not `framed` (chats bring their own).

    Scored are the contents of segments with `loss`; the video_start that follows a text or a learned video (the decision
    to show one); and the end id after a last text with `loss`, or after a record that is learned whole. video_end never
    is: it always follows the N-th code. Nor is the end after a video sampled for a given text: `generate` stops there by
    itself, and learned from most sequences it would answer for the caption that `describe` asks for after a video.
    """
    ids: list[int] = layout._begin() if framed else []
    labels: list[int] = [IGNORE] * len(ids)
    decided = False
    for segment in segments:
        if segment.kind == "text":
            ids += segment.content
            labels += segment.content if segment.loss else [IGNORE] * len(segment.content)
            decided = bool(segment.content)
            continue
        span = layout.vocabulary.span(segment.content)
        ids += span
        start = span[0] if segment.loss and decided else IGNORE
        labels += [start, *(span[1:-1] if segment.loss else [IGNORE] * (len(span) - 2)), IGNORE]
        decided = segment.loss
    if framed and layout.eos is not None:
        ids.append(layout.eos)
        last = segments[-1] if segments else None
        ended = last is not None and last.loss and (last.kind == "text" or all(segment.loss for segment in segments))
        labels.append(layout.eos if ended else IGNORE)
    return TokenSequence(torch.tensor(ids, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64))


def text_to_video(text: SequenceOf[int], codes: SequenceOf[int]) -> list[Segment]:
    """A caption that is given, then the video that is learned; an empty caption teaches the unconditional video."""
    return [Segment("text", tuple(text), loss=False), Segment("video", tuple(codes), loss=True)]


def video_to_text(text: SequenceOf[int], codes: SequenceOf[int]) -> list[Segment]:
    """A video that is given, then its caption, learned."""
    return [Segment("video", tuple(codes), loss=False), Segment("text", tuple(text), loss=True)]


def continuation(text: SequenceOf[int], given: SequenceOf[int], codes: SequenceOf[int]) -> list[Segment]:
    """A text (may be empty) and the codes of the given frames, then the whole clip, which is learned.

    The clip's video_start is not scored: `continue_video` forces it.
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
    """`"before <video> after"` and (codes, loss) of each video -> segments; `loss` is that of the text.

    Raises ValueError, naming `where`, if placeholders and videos do not match in number.
    """
    pieces = text.split(PLACEHOLDER)
    check_placeholders(len(pieces) - 1, len(videos), where)
    segments = []
    for number, piece in enumerate(pieces):
        if piece:
            segments.append(Segment("text", tuple(encode_text(piece)), loss))
        if number < len(videos):
            codes, learned = videos[number]
            segments.append(Segment("video", tuple(codes), learned))
    return segments


def check_placeholders(placeholders: int, videos: int, where: str) -> None:
    """ValueError unless there is one video for each placeholder."""
    if placeholders != videos:
        more = f"add {PLACEHOLDER} where a video stands" if videos > placeholders else "name the missing videos"
        raise ValueError(
            f"{where}: the text has {placeholders} {PLACEHOLDER} placeholders but {videos} videos: {more}, one for each"
        )


def check_length(length: int, positions: int, where: str, remedy: str = "shorten the text") -> None:
    """ValueError if `length` ids do not fit the `positions` of a model; nothing is ever truncated."""
    if length > positions:
        raise ValueError(f"{where}: {length} ids, but the base model has {positions} positions: {remedy}")
