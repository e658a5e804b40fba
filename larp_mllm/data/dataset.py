"""Token caches, records and text as token sequences of several tasks, mixed by weight.

What a batch holds is a function of (seed, step). Sequences have S ids, int64.
"""

import math
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from larp.data.token_cache import TokenCache, batch_rows
from larp.models.noise import BatchNoise
from larp_mllm.data.phrases import Phrases, drop_mirrored_directions, drop_without_text
from larp_mllm.data.records import RecordSet
from larp_mllm.data.text_data import TextSet
from larp_mllm.processing.chat import chat_segments
from larp_mllm.processing.token_sequence import (
    Layout,
    TokenSequence,
    check_length,
    continuation,
    encode,
    text_to_video,
    video_to_text,
)

import torch

VIDEO_TASKS = ("text_to_video", "video_to_text", "chat", "continuation")
TASKS = (*VIDEO_TASKS, "interleaved", "text", "own_answers")

# The caption comes after a colon or alone, so that "surfing" fits as well as "a person surfing". Many forms, so that a request in
# words of its own is understood (LOG.md).
REQUESTS = (
    "{}",
    "Show me a video: {}",
    "Make a short video of this: {}",
    "Please draw me a clip. It shows: {}",
    "Generate a video: {}",
    "Generate a clip. {}",
    "I want to watch this: {}",
    "I would like to see a video. It shows: {}",
    "Create a video with this content: {}",
    "Can you make a video of this? {}",
    "Could you show me a clip? Topic: {}",
    "Video, please: {}",
    "Let me see it as a video: {}",
    "Give me a clip of the following: {}",
    "Play a video for me: {}",
    "Film this: {}",
    "Please animate this: {}",
    "Produce a few seconds of video: {}",
    "What would this look like on video? {}",
    "Next, show: {}",
)
QUESTIONS = (
    "What does this video show?",
    "Describe this video.",
    "What is happening here?",
    "What can you see in the clip?",
    "What is this about?",
    "Please say in a few words what happens in this video.",
)
NUM_DIALOGUES = len(REQUESTS) + len(QUESTIONS)
"""Number of forms of a chat about one video."""

_REMEMBERED = 100_000
"""Texts whose ids are remembered."""

Candidate = tuple[int, str, str, int]
"""The arguments of `CaptionedVideos.sequence`: row, text, task, form of a dialogue."""


@dataclass(frozen=True)
class Tasks:
    """How often each task is sampled, by weight; tasks without data are left out."""

    text_to_video: float = 0.6
    """A caption is given, its video is learned."""
    video_to_text: float = 0.2
    """A video is given, its caption is learned."""
    chat: float = 0.1
    """A captioned video as a chat in the base's own template: a request and its video, or a video, a question and the answer."""
    continuation: float = 0.2
    """The first frames of a clip are given, the clip is learned; needs a token cache with --condition-frames."""
    interleaved: float = 0.2
    """Records of text and videos in any order, and chats."""
    text: float = 0.2
    """Text alone, so that the language model keeps what it knows."""
    own_answers: float = 0.2
    """What a pretrained base with a chat template answers to questions that come with the package, and prose that it writes, so that
    it keeps what it was."""
    caption_dropout: float = 0.1
    """Probability that text-to-video is learned without its caption, which guidance needs; in [0, 1)."""
    continuation_text: float = 0.5
    """Probability that continuation is learned with the caption before the frames; in [0, 1]."""

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


class TrainingMix:
    """Training sequences of all tasks that have a weight and data.

    Args:
        tasks: weights and rates.
        videos: data of the tasks in VIDEO_TASKS, or None.
        records: data of the task interleaved, or None.
        text: data of the task text, or None.
        own_answers: data of the task own_answers, or None.

    Raises ValueError if no task has both a weight and data.
    """

    def __init__(
        self,
        tasks: Tasks,
        videos: "CaptionedVideos | None" = None,
        records: RecordSet | None = None,
        text: TextSet | None = None,
        own_answers: RecordSet | None = None,
    ):
        self.tasks, self.videos, self.own_answers = tasks, videos, own_answers
        self._sources = {task: (0, videos) for task in (videos.tasks if videos else ())}
        self._sources |= {"interleaved": (1, records)} if records else {}
        self._sources |= {"text": (2, text)} if text else {}
        self._sources |= {"own_answers": (3, own_answers)} if own_answers else {}
        weights = {task: getattr(tasks, task) for task in TASKS if task in self._sources and getattr(tasks, task) > 0}
        if not weights:
            raise ValueError(
                f"nothing to train on: there are data for {', '.join(self._sources) or 'no task'}, but weights only for "
                f"{_listed({task: getattr(tasks, task) for task in TASKS if getattr(tasks, task) > 0})}. Give --tokens, "
                "--records or --text, or raise a --tasks weight"
            )
        self.shares = {task: weight / sum(weights.values()) for task, weight in weights.items()}
        """The fraction of the sequences that each task gets; they sum to 1."""

    def batch(self, step: int, global_batch: int, seed: int) -> list[TokenSequence]:
        """Return the sequences of one training step of all ranks; they do not depend on the number of ranks.

        Each place of the batch samples a task and takes a row of that task's source. The rows of a source are shuffled
        anew in each epoch.
        """
        return [
            self._video(row, task, for_phrase, for_text) if task in VIDEO_TASKS else self._sources[task][1][row]
            for task, row, for_phrase, for_text in self._places(step, global_batch, seed)
        ]

    def clips_of(self, step: int, global_batch: int, seed: int) -> list[str]:
        """Return the names of what `batch` returns: videos, records as FILE:LINE, and pieces of text by their number."""
        names = {task: source.cache.names if task in VIDEO_TASKS else getattr(source, "names", None)
                 for task, (_, source) in self._sources.items()}  # fmt: skip
        return [
            names[task][row] if names[task] else f"{task} {row}"
            for task, row, *_ in self._places(step, global_batch, seed)
        ]

    def _places(self, step: int, global_batch: int, seed: int) -> Iterator[tuple[str, int, float, float]]:
        """Yield the task and the row of each place of a batch, and its random numbers of phrase and text."""
        uniforms = BatchNoise(seed, step, global_batch).uniform(3).tolist()
        rows: dict[int, list[int]] = {}
        for place, (for_task, for_phrase, for_text) in enumerate(uniforms):
            task = self._task(for_task)
            number, source = self._sources[task]
            if number not in rows:
                rows[number] = batch_rows(len(source), step, global_batch, seed + number).tolist()
            yield task, rows[number][place], for_phrase, for_text

    def _task(self, uniform: float) -> str:
        for task, share in self.shares.items():
            if uniform < share:
                return task
            uniform -= share
        return next(reversed(self.shares))  # the shares may sum to slightly less than 1

    def _video(self, row: int, task: str, for_phrase: float, for_text: float) -> TokenSequence:
        phrases = self.videos.phrases[row]
        without_text = {
            "text_to_video": for_text < self.tasks.caption_dropout,
            "continuation": for_text >= self.tasks.continuation_text,
        }.get(task)
        form = sample_dialogue(for_text) if task == "chat" else 0
        return self.videos.sequence(row, "" if without_text else phrases[int(for_phrase * len(phrases))], task, form)


class CaptionedVideos:
    """The rows of a token cache as token sequences; mirrored rows whose caption names a direction are left out.

    Args:
        cache: codes, with a caption or a class for each video.
        layout: of the ids.
        encode_text: text -> text ids, as `LarpMllmProcessor.encode_text`.
        positions: of the base model.
        tokenizer: the text tokenizer, whose template formats chats; without it the task chat has no data.

    Raises ValueError if no video has a caption or a class; videos with neither are left out.
    """

    def __init__(
        self,
        cache: TokenCache,
        layout: Layout,
        encode_text: Callable[[str], list[int]],
        positions: int,
        tokenizer=None,
    ):
        described = drop_without_text(cache)
        self.cache = drop_mirrored_directions(described)
        self.left_out = {
            "neither a caption nor a class": len(cache) - len(described),
            "mirrored, with left or right in the caption": len(described) - len(self.cache),
        }
        """Number of clips by the reason for which they are left out."""
        self.layout = layout
        self.positions = positions
        self.tokenizer = tokenizer
        self.phrases = Phrases(self.cache)
        self._encode_text = encode_text
        self._encoded: dict[str, list[int]] = {}
        self._others: dict[tuple[str, int], int] = {}

    def __len__(self) -> int:
        return len(self.cache)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that have data: chats need a text tokenizer, continuation needs the codes of given frames."""
        given = self.cache.take("conditions", torch.zeros(1, dtype=torch.int64))
        lacking = {"chat": self.tokenizer is None, "continuation": given is None}
        return tuple(task for task in VIDEO_TASKS if not lacking.get(task))

    def sequence(self, row: int, text: str, task: str, form: int = 0) -> TokenSequence:
        """Return a row with a text as a sequence of one of VIDEO_TASKS.

        Args:
            form: of the dialogue, for the task chat: 0 to NUM_DIALOGUES - 1.

        Raises ValueError for continuation from a cache without given frames, and for more ids than positions.
        """
        sequence = self._build(row, text, task, form)
        self._check_length(len(sequence.ids), row, task)
        return sequence

    def evaluation_sequence(self, row: int, task: str) -> TokenSequence:
        """Return a row in its first phrasing; continuation has no text, which is the default of `continue_video`."""
        return self.sequence(row, self._evaluation_text(row, task), task)

    def training_candidates(self, tasks: Tasks, over: int = 0) -> Iterator[Candidate]:
        """Yield sequences among which is the longest that a `TrainingMix` with these tasks can sample, if it has over `over` ids.

        Rows of equal text have equally many ids, so each text comes with its first row only.
        """
        sampled = [task for task in self.tasks if getattr(tasks, task) > 0]
        rows = self._first_rows(sampled, over)
        for task in sampled:
            without_text = task == "continuation" and not tasks.continuation_text
            for text, row in ({"": 0} if without_text and len(self) else rows).items():
                yield from ((row, text, task, form) for form in _forms(task))

    def evaluation_candidates(self, tasks: Collection[str], over: int = 0) -> Iterator[Candidate]:
        """Yield what `evaluation_sequence` returns for these tasks, each text with its first row only; see `training_candidates`."""
        first = self._first_rows(tasks, over, phrasings=1)
        for task in tasks:
            rows = {"": 0} if task == "continuation" and len(self) else first
            yield from ((row, text, task, 0) for text, row in rows.items())

    def _first_rows(self, tasks: Collection[str], over: int, phrasings: int | None = None) -> dict[str, int]:
        """Return the first row of each text, those of later rows first, without texts too short for sequences of over `over` ids.

        tasks: of the sequences. A base whose chat template cannot be trained on has none of the task chat.
        phrasings: how many texts of each row; None: all.
        """
        least = -1
        if over:
            others = max((self._most_others(task, form) for task in tasks for form in _forms(task)), default=0)
            least = max(-1, (over - others - 1) // 12)  # a byte has at most 12 ids, see `_most_ids`
        first: dict[str, int] = {}
        last: dict[str, tuple[int, int]] = {}
        for row, texts in self.phrases.longer_than(least):
            for place, text in enumerate(texts[:phrasings]):
                first.setdefault(text, row)
                last[text] = -row, place
        return {text: first[text] for text in sorted(first, key=last.__getitem__)}

    def _most_others(self, task: str, form: int) -> int:
        """Return an upper bound of the ids besides those of the text: all videos of a cache have equally many codes."""
        if (task, form) not in self._others:
            self._others[task, form] = len(self._build(0, "a", task, form).ids) + max(map(len, REQUESTS))
        return self._others[task, form]

    def longest(self, candidates: Iterable[Candidate], over: int = 0) -> tuple[int, int, str] | None:
        """Return (number of ids, row, task) of the longest candidate; None if none has more than `over` ids.

        Texts that are too short in bytes to be longest are not encoded.
        """
        found = None
        for row, text, task, form in candidates:
            longest = max(over, found[0] if found else 0)
            if self._most_others(task, form) + _most_ids(text) > longest:
                length = len(self._build(row, text, task, form).ids)
                found = (length, row, task) if length > longest else found
        return found

    def check_lengths(self, candidates: Iterable[Candidate]) -> None:
        """Raise ValueError that names the video of the longest candidate if that has more ids than positions."""
        if (longest := self.longest(candidates, self.positions)) is not None:
            self._check_length(*longest)

    def _check_length(self, length: int, row: int, task: str) -> None:
        option = f"--tasks.{task.replace('_', '-')} 0"
        where = f"video {self.cache.names[row]} ({task.replace('_', '-')})"
        check_length(length, self.positions, where, f"shorten the text, or leave the task out with {option}")

    def _evaluation_text(self, row: int, task: str) -> str:
        return "" if task == "continuation" else self.phrases[row][0]

    def _build(self, row: int, text: str, task: str, form: int = 0) -> TokenSequence:
        number = torch.tensor([row])
        codes = self.cache.take("codes", number)[0].tolist()
        if task == "chat":
            messages = dialogue(form, text, codes)
            segments = chat_segments(messages, self.tokenizer, self._ids, lambda part: part["video"])
        elif task == "continuation":
            if (given := self.cache.take("conditions", number)) is None:
                raise ValueError(
                    "the token cache holds no codes of given frames, which continuation needs: extract the tokens with "
                    "--condition-frames 5, into another folder"
                )
            segments = continuation(self._ids(text), given[0].tolist(), codes)
        else:
            segments = {"text_to_video": text_to_video, "video_to_text": video_to_text}[task](self._ids(text), codes)
        return encode(segments, self.layout, add_special_tokens=task != "chat")

    def _ids(self, text: str) -> list[int]:
        if text not in self._encoded:
            if len(self._encoded) >= _REMEMBERED:
                self._encoded.clear()
            self._encoded[text] = self._encode_text(text) if text else []
        return self._encoded[text]


def evaluated_tasks(held_out: CaptionedVideos, trained: Collection[str]) -> tuple[str, ...]:
    """Return the tasks to evaluate on held-out videos: the trained ones; if none, captions in both directions."""
    return tuple(task for task in held_out.tasks if task in trained) or ("text_to_video", "video_to_text")


def evaluation_rows(rows: int, most: int) -> list[int]:
    """Return at most `most` row numbers, evenly spaced, so that a sorted cache is not evaluated on its first class."""
    count = min(rows, most)
    return torch.linspace(0, rows - 1, count).round().long().tolist() if count else []


def dialogue(form: int, caption: str, video: object) -> list[dict]:
    """Return a chat about a video as messages, see `larp_mllm.processing.chat.chat_segments`.

    form: 0 to NUM_DIALOGUES - 1; first the requests for a video, then the questions about one.
    """
    shown = [{"type": "video", "video": video}]
    if form < len(REQUESTS):
        return [
            {"role": "user", "content": REQUESTS[form].format(caption)},
            {"role": "assistant", "content": shown},
        ]
    question = {"type": "text", "text": QUESTIONS[form - len(REQUESTS)]}
    return [{"role": "user", "content": [*shown, question]}, {"role": "assistant", "content": caption}]


def sample_dialogue(uniform: float) -> int:
    """Return the form for a number in [0, 1): requests and questions are equally frequent."""
    requests, questions = len(REQUESTS), len(QUESTIONS)
    if uniform < 0.5:
        return int(2 * uniform * requests)
    return requests + int((2 * uniform - 1) * questions)


def _forms(task: str) -> range:
    return range(NUM_DIALOGUES if task == "chat" else 1)


def _most_ids(text: str) -> int:
    """Return an upper bound of the ids of a text: one for each byte, and one for a space that the tokenizer may add.

    Some tokenizers compose or decompose characters first, so the bytes of both forms are counted.
    """
    size = len(text.encode())
    return 1 + size + (0 if text.isascii() else len(unicodedata.normalize("NFKD", text).encode()))


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
