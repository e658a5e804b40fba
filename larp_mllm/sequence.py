"""Records of text and videos <-> ids and labels. Pure: no files, no model, no strings that stand for tokens."""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Literal

from larp_mllm.vocabulary import Vocabulary

import torch
from torch import Tensor

IGNORE = -100
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
        """The ids after which the first code is drawn; an empty text gives the unconditional prompt of guidance."""
        return [*self._begin(), *text, self.vocabulary.video_start]

    def question(self, codes: SequenceOf[int]) -> list[int]:
        """The ids after which the caption of a video is drawn."""
        return [*self._begin(), *self.vocabulary.span(codes)]

    def _begin(self) -> list[int]:
        return [] if self.bos is None else [self.bos]


def encode(segments: SequenceOf[Segment], layout: Layout) -> TokenSequence:
    """Segments in order -> begin id, the segments, end id.

    Scored are the contents of segments with `loss`; the video_start that ends a text (the decision to show a video);
    and the end id after a last text with `loss`, or after a record that is learned whole. video_end never is: it always
    follows the N-th code. Nor is the end after a video drawn for a given text: `generate` stops there by itself, and learned
    from most sequences it would answer for the caption that `describe` asks for after a video.
    """
    ids: list[int] = layout._begin()
    labels: list[int] = [IGNORE] * len(ids)
    after_text = False
    for segment in segments:
        if segment.kind == "text":
            ids += segment.content
            labels += segment.content if segment.loss else [IGNORE] * len(segment.content)
            after_text = bool(segment.content)
            continue
        span = layout.vocabulary.span(segment.content)
        ids += span
        start = span[0] if segment.loss and after_text else IGNORE
        labels += [start, *(span[1:-1] if segment.loss else [IGNORE] * (len(span) - 2)), IGNORE]
        after_text = False
    if layout.eos is not None:
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


def interleaved(record: dict, encode_text: Callable[[str], list[int]], where: str = "record") -> list[Segment]:
    """`{"text": "before <video> after", "videos": [codes, ...]}` -> segments, all of them learned.

    Raises ValueError, naming `where`, if placeholders and videos do not match in number.
    """
    pieces, videos = record["text"].split(PLACEHOLDER), list(record.get("videos", []))
    if len(pieces) != len(videos) + 1:
        raise ValueError(f"{where}: the text has {len(pieces) - 1} {PLACEHOLDER} placeholders but {len(videos)} videos")
    segments = []
    for piece, codes in zip(pieces, [*videos, None], strict=True):
        if piece:
            segments.append(Segment("text", tuple(encode_text(piece)), loss=True))
        if codes is not None:
            segments.append(Segment("video", tuple(codes), loss=True))
    return segments


def check_length(length: int, positions: int, where: str) -> None:
    """ValueError if `length` ids do not fit the `positions` of a model; nothing is ever truncated."""
    if length > positions:
        raise ValueError(f"{where}: {length} ids, but the base model has {positions} positions: shorten the text")
