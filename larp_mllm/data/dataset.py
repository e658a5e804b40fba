"""Token caches, records and text -> token sequences of mixed tasks; what is sampled follows from (seed, step)."""

import math
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from larp.data.datasets import humanize
from larp.data.token_cache import TokenCache, batch_rows
from larp.models.noise import BatchNoise
from larp_mllm.data.records import RecordSet
from larp_mllm.data.text_data import TextSet
from larp_mllm.processing.chat import chat_segments
from larp_mllm.processing.sequence import (
    Layout,
    TokenSequence,
    check_length,
    continuation,
    encode,
    text_to_video,
    video_to_text,
)

import torch

# A caption stands behind a colon or alone, so that "surfing" fits as well as "a person surfing".
WISHES = ("{}", "Show me a video: {}", "Make a short video of this: {}", "Please draw me a clip. It shows: {}")
QUESTIONS = ("What does this video show?", "Describe this video.", "What is happening here?")

DIALOGUES = len(WISHES) + len(QUESTIONS)
"""How many forms a chat about one video has."""


def dialogue(number: int, caption: str, video: object) -> list[dict]:
    """Form `number`, 0 to DIALOGUES - 1, of a chat about a video: messages as in `larp_mllm.processing.chat.chat_segments`."""
    shown = [{"type": "video", "video": video}]
    if number < len(WISHES):
        return [
            {"role": "user", "content": WISHES[number].format(caption)},
            {"role": "assistant", "content": shown},
        ]
    question = {"type": "text", "text": QUESTIONS[number - len(WISHES)]}
    return [{"role": "user", "content": [*shown, question]}, {"role": "assistant", "content": caption}]


def sample_dialogue(uniform: float) -> int:
    """The form that a number in [0, 1) stands for: wishes and questions are equally frequent."""
    wishes, questions = len(WISHES), len(QUESTIONS)
    if uniform < 0.5:
        return int(2 * uniform * wishes)
    return wishes + int((2 * uniform - 1) * questions)


# Class names are actions more often than things, and a prompt comes in any of these forms.
PHRASINGS = ("{}", "a person {}", "a video of {}", "a video of a person {}", "someone is {}", "a short clip of {}")
VIDEO_TASKS = ("text_to_video", "video_to_text", "chat", "continuation")
TASKS = (*VIDEO_TASKS, "interleaved", "text")

_DIRECTION = re.compile(r"\b(?:left|right)(?:most|wards?)?\b", re.IGNORECASE)

Draw = tuple[int, str, str, int]
"""What `CaptionedVideos.sequence` takes: row, text, task, form of a dialogue."""


@dataclass(frozen=True)
class Tasks:
    """How often each task is sampled, by weight; tasks without data fall away."""

    text_to_video: float = 0.6
    """A caption is given, its video learned."""
    video_to_text: float = 0.2
    """A video is given, its caption learned."""
    chat: float = 0.1
    """A captioned video as a chat in the base's own template: a wish and its video, or a video, a question and the answer."""
    continuation: float = 0.2
    """The first frames of a clip are given, the clip is learned; needs a token cache with --condition-frames."""
    interleaved: float = 0.2
    """Records of text and videos in any order, and chats."""
    text: float = 0.2
    """Text alone, so that the language model keeps what it knows."""
    caption_dropout: float = 0.1
    """How often text-to-video is learned without its caption, which guidance needs; in [0, 1)."""
    continuation_text: float = 0.5
    """How often continuation is learned with the caption before the frames; in [0, 1]."""

    def __post_init__(self):
        weights = {task: getattr(self, task) for task in TASKS}
        if wrong := {task: weight for task, weight in weights.items() if not 0 <= weight < math.inf}:
            raise ValueError(f"task weights must be finite and 0 or more, got {_listed(wrong)}")
        if not any(weights.values()):
            raise ValueError(f"task weights must not all be 0: raise one of {', '.join(TASKS)}")
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout must lie in [0, 1), got {self.caption_dropout}")
        if not 0 <= self.continuation_text <= 1:
            raise ValueError(f"continuation_text must lie in [0, 1], got {self.continuation_text}")


class CaptionedVideos:
    """The rows of a token cache as training sequences.

    encode_text: text -> text ids (LarpMllmProcessor.encode_text). positions: of the base model. tokenizer: the text
    tokenizer, by whose template chats are written; without it there are none. Raises ValueError if a video has neither a
    caption nor a class.
    """

    def __init__(
        self,
        cache: TokenCache,
        layout: Layout,
        encode_text: Callable[[str], list[int]],
        positions: int,
        tokenizer=None,
    ):
        self.cache = drop_mirrored_directions(cache)
        self.layout = layout
        self.positions = positions
        self.tokenizer = tokenizer
        self.phrases = caption_phrases(self.cache)
        self._encode_text = encode_text
        self._encoded: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.cache)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that these rows can teach: chats need a text tokenizer, continuation the codes of given frames."""
        lacking = {"chat": self.tokenizer is None, "continuation": self.cache.conditions is None}
        return tuple(task for task in VIDEO_TASKS if not lacking.get(task))

    def fixed(self, row: int, task: str) -> TokenSequence:
        """A row for evaluation: in its first phrasing; continuation without text, as `continue_video` by default."""
        return self.sequence(row, self._fixed_text(row, task), task)

    def _fixed_text(self, row: int, task: str) -> str:
        return "" if task == "continuation" else self.phrases[row][0]

    def sequence(self, row: int, text: str, task: str, form: int = 0) -> TokenSequence:
        """A row with this text; task: text_to_video, video_to_text, chat (in this form of a dialogue) or continuation.

        Raises ValueError for continuation from a cache without given frames, and if there are more ids than positions.
        """
        sequence = self._built(row, text, task, form)
        self._check_length(len(sequence.ids), row, task)
        return sequence

    def _built(self, row: int, text: str, task: str, form: int = 0) -> TokenSequence:
        codes = self.cache.codes[row].tolist()
        if task == "chat":
            messages = dialogue(form, text, codes)
            segments = chat_segments(messages, self.tokenizer, self._ids, lambda part: part["video"])
        elif task == "continuation":
            if self.cache.conditions is None:
                raise ValueError(
                    "the token cache holds no codes of given frames, which continuation needs: extract the tokens with "
                    "--condition-frames 5, into another folder"
                )
            segments = continuation(self._ids(text), self.cache.conditions[row].tolist(), codes)
        else:
            segments = {"text_to_video": text_to_video, "video_to_text": video_to_text}[task](self._ids(text), codes)
        return encode(segments, self.layout, add_special_tokens=task != "chat")

    def _ids(self, text: str) -> list[int]:
        if text not in self._encoded:
            self._encoded[text] = self._encode_text(text) if text else []
        return self._encoded[text]

    def sampled(self, tasks: Tasks) -> Iterator[Draw]:
        """All that a `TrainingMix` with these tasks can sample and that may be longest: each text once, with its first row."""
        rows = {text: row for row in reversed(range(len(self))) for text in self.phrases[row]}
        for task in (task for task in self.tasks if getattr(tasks, task) > 0):
            without = task == "continuation" and not tasks.continuation_text
            for text, row in ({"": 0} if without and rows else rows).items():
                yield from ((row, text, task, form) for form in range(DIALOGUES if task == "chat" else 1))

    def judged(self, tasks: Collection[str]) -> Iterator[Draw]:
        """What `fixed` makes of the rows for these tasks, each text once."""
        for task in tasks:
            rows = {self._fixed_text(row, task): row for row in reversed(range(len(self)))}
            yield from ((row, text, task, 0) for text, row in rows.items())

    def longest(self, samples: Iterable[Draw], over: int = 0) -> tuple[int, int, str] | None:
        """(ids, row, task) of the longest of the sequences, exactly; None if none has more than `over` ids.

        Those that cannot have so many, seen by the size of their text, are not encoded.
        """
        # The ids of everything around a text: all videos of a cache have as many codes.
        around: dict[tuple[str, int], int] = {}
        found = None
        for row, text, task, form in samples:
            if (task, form) not in around:
                around[task, form] = len(self._built(row, "a", task, form).ids) + max(map(len, WISHES))
            most = max(over, found[0] if found else 0)
            if around[task, form] + _most_ids(text) > most:
                length = len(self._built(row, text, task, form).ids)
                found = (length, row, task) if length > most else found
        return found

    def check_lengths(self, samples: Iterable[Draw]) -> None:
        """ValueError that names the video of the longest sequence, if that has more ids than there are positions."""
        if (longest := self.longest(samples, self.positions)) is not None:
            self._check_length(*longest)

    def _check_length(self, length: int, row: int, task: str) -> None:
        option = f"--tasks.{task.replace('_', '-')} 0"
        where = f"video {self.cache.names[row]} ({task.replace('_', '-')})"
        check_length(length, self.positions, where, f"shorten the text, or leave the task out with {option}")


class TrainingMix:
    """Training sequences of all tasks that have a weight and data.

    Args:
        tasks: weights and rates.
        videos, records, text: the data, None for what there is not: the tasks on token caches, interleaved, text.

    Raises ValueError if no task has both a weight and data.
    """

    def __init__(
        self,
        tasks: Tasks,
        videos: CaptionedVideos | None = None,
        records: RecordSet | None = None,
        text: TextSet | None = None,
    ):
        self.tasks, self.videos = tasks, videos
        self._sources = {task: (0, videos) for task in (videos.tasks if videos else ())}
        self._sources |= {"interleaved": (1, records)} if records else {}
        self._sources |= {"text": (2, text)} if text else {}
        weights = {task: getattr(tasks, task) for task in TASKS if task in self._sources and getattr(tasks, task) > 0}
        if not weights:
            raise ValueError(
                f"nothing to train on: there are data for {', '.join(self._sources) or 'no task'}, but weights only for "
                f"{_listed({task: getattr(tasks, task) for task in TASKS if getattr(tasks, task) > 0})}: give --tokens, "
                "--records or --text, or raise a --tasks weight"
            )
        self.shares = {task: weight / sum(weights.values()) for task, weight in weights.items()}
        """What part of the sequences each task gets; they sum to 1."""

    def batch(self, step: int, global_batch: int, seed: int) -> list[TokenSequence]:
        """The sequences of one training step, all ranks together: the same whatever their number.

        A place in the batch samples its task, and takes the row that its source has there; the rows of a source come in
        a new order each epoch.
        """
        sampled = BatchNoise(seed, step, global_batch).uniform(3).tolist()
        rows: dict[int, list[int]] = {}
        sequences = []
        for place, (task, phrase, text) in enumerate(sampled):
            task = self._task(task)
            number, source = self._sources[task]
            if number not in rows:
                rows[number] = batch_rows(len(source), step, global_batch, seed + number).tolist()
            row = rows[number][place]
            sequences.append(self._video(row, task, phrase, text) if task in VIDEO_TASKS else source[row])
        return sequences

    def _task(self, sampled: float) -> str:
        for task, share in self.shares.items():
            if sampled < share:
                return task
            sampled -= share
        return next(reversed(self.shares))  # what rounding leaves

    def _video(self, row: int, task: str, phrase: float, text: float) -> TokenSequence:
        phrases = self.videos.phrases[row]
        without = {
            "text_to_video": text < self.tasks.caption_dropout,
            "continuation": text >= self.tasks.continuation_text,
        }
        form = sample_dialogue(text) if task == "chat" else 0
        return self.videos.sequence(row, "" if without.get(task) else phrases[int(phrase * len(phrases))], task, form)


def caption_phrases(cache: TokenCache) -> list[tuple[str, ...]]:
    """For each row the texts it may be called by: its caption, or the phrasings of its class.

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
    return tuple(p.format(class_name) for p in PHRASINGS) if caption in (None, class_name) else (caption,)


def drop_mirrored_directions(cache: TokenCache) -> TokenCache:
    """Return the cache without the mirrored rows whose text says left or right: they show the opposite direction."""
    mirrored = cache.flipped.tolist()
    wrong = [mirrored[row] and any(map(_DIRECTION.search, _phrases(cache, row))) for row in range(len(cache))]
    return cache.select((~torch.tensor(wrong)).nonzero()[:, 0]) if any(wrong) else cache


def _most_ids(text: str) -> int:
    """Ids that a tokenizer makes of a text at most: one of a byte, and one of a space that it may put before.

    Some tokenizers take characters apart or put them together first, so that the bytes of both are counted.
    """
    size = len(text.encode())
    return 1 + size + (0 if text.isascii() else len(unicodedata.normalize("NFKD", text).encode()))


def evaluated_tasks(held_out: CaptionedVideos, trained: Collection[str]) -> tuple[str, ...]:
    """The tasks that held-out videos judge: those that were `trained`; after records alone, captions in both directions."""
    return tuple(task for task in held_out.tasks if task in trained) or ("text_to_video", "video_to_text")


def evaluation_rows(rows: int, most: int) -> list[int]:
    """At most `most` row numbers, evenly spread, so that a sorted cache is not judged by its first class."""
    count = min(rows, most)
    return torch.linspace(0, rows - 1, count).round().long().tolist() if count else []


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
