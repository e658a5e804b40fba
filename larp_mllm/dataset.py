"""A token cache with captions or classes -> token sequences of mixed tasks; what is drawn follows from (seed, step)."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from larp.data.datasets import humanize
from larp.data.tokens import TokenCache, batch_rows
from larp.noise import BatchNoise
from larp_mllm.sequence import Layout, TokenSequence, check_length, encode, text_to_video, video_to_text

import torch

# Class names are actions more often than things, and a prompt comes in any of these forms.
PHRASINGS = ("{}", "a person {}", "a video of {}", "a video of a person {}", "someone is {}", "a short clip of {}")
_MIRROR = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}


@dataclass(frozen=True)
class Tasks:
    """How often each task is drawn, by weight, and how often a caption is left out of text-to-video (for guidance)."""

    text_to_video: float = 0.8
    video_to_text: float = 0.2
    caption_dropout: float = 0.1

    def __post_init__(self):
        if min(self.text_to_video, self.video_to_text) < 0 or self.text_to_video + self.video_to_text <= 0:
            raise ValueError(
                f"task weights must be 0 or more and not all 0, got text_to_video {self.text_to_video}, "
                f"video_to_text {self.video_to_text}"
            )
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout must lie in [0, 1), got {self.caption_dropout}")


class CaptionedVideos:
    """The rows of a token cache as training sequences.

    encode_text: text -> text ids (LarpMllmProcessor.encode_text). positions: of the base model; a longer sequence is a
    ValueError. Raises ValueError if a video has neither a caption nor a class.
    """

    def __init__(self, cache: TokenCache, layout: Layout, encode_text: Callable[[str], list[int]], positions: int):
        self.cache = cache
        self.layout = layout
        self.positions = positions
        self.phrases = caption_phrases(cache)
        self._encode_text = encode_text
        self._encoded: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.cache)

    def batch(self, step: int, global_batch: int, seed: int, tasks: Tasks) -> list[TokenSequence]:
        """The sequences of one training step, all ranks together: the same whatever their number."""
        rows = batch_rows(len(self.cache), step, global_batch, seed).tolist()
        drawn = BatchNoise(seed, step, global_batch).uniform(3).tolist()
        share = tasks.text_to_video / (tasks.text_to_video + tasks.video_to_text)
        return [
            self._draw(row, share, tasks.caption_dropout, *uniforms) for row, uniforms in zip(rows, drawn, strict=True)
        ]

    def _draw(self, row: int, share: float, dropout: float, task: float, phrase: float, drop: float) -> TokenSequence:
        phrases = self.phrases[row]
        text = phrases[int(phrase * len(phrases))]
        if task >= share:
            return self.sequence(row, text, "video_to_text")
        return self.sequence(row, "" if drop < dropout else text, "text_to_video")

    def fixed(self, row: int, task: str) -> TokenSequence:
        """A row in its first phrasing, for evaluation; task: text_to_video or video_to_text."""
        return self.sequence(row, self.phrases[row][0], task)

    def sequence(self, row: int, text: str, task: str) -> TokenSequence:
        """A row with this text; task: text_to_video or video_to_text."""
        if text not in self._encoded:
            self._encoded[text] = self._encode_text(text)
        make = {"text_to_video": text_to_video, "video_to_text": video_to_text}[task]
        sequence = encode(make(self._encoded[text], self.cache.codes[row].tolist()), self.layout)
        check_length(len(sequence.ids), self.positions, f"video {self.cache.names[row]}")
        return sequence


def caption_phrases(cache: TokenCache) -> list[tuple[str, ...]]:
    """For each row the texts it may be called by: its caption, or the phrasings of its class; mirrored clips say so.

    Raises ValueError that names the first video without either.
    """
    return [_phrases(cache, row) for row in range(len(cache))]


def _phrases(cache: TokenCache, row: int) -> tuple[str, ...]:
    label, caption = int(cache.labels[row]), cache.captions[row]
    class_name = humanize(cache.classes[label]) if label >= 0 and cache.classes else None
    if caption is None and class_name is None:
        raise ValueError(
            f"video {cache.names[row]} has neither a caption nor a class, so there is no text to learn: extract tokens "
            "from a manifest with a caption or label column"
        )
    # A data set with classes calls its videos by their class; only a caption of its own says more.
    texts = tuple(p.format(class_name) for p in PHRASINGS) if caption in (None, class_name) else (caption,)
    return tuple(mirrored(text) for text in texts) if cache.flipped[row] else texts


def mirrored(text: str) -> str:
    """The caption of the mirrored video: left and right change places."""
    return re.sub(r"\b([Ll]eft|[Rr]ight)\b", lambda found: _MIRROR[found[0]], text)


def evaluation_rows(rows: int, most: int) -> list[int]:
    """At most `most` row numbers, evenly spread, so that a sorted cache is not judged by its first class."""
    count = min(rows, most)
    return torch.linspace(0, rows - 1, count).round().long().tolist() if count else []
