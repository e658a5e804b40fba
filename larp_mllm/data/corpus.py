"""What a language model is trained and judged on: token caches, records, and text, opened and held against each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from larp.data.token_cache import TokenCache
from larp.engine.distributed import main_first
from larp.models.tokenizer import LarpTokenizer
from larp_mllm.data.dataset import CaptionedVideos, Tasks, caption_phrases, evaluated_tasks
from larp_mllm.data.leakage import HELD_OUT, held_out_rows, same_text, same_videos, same_videos_of_records
from larp_mllm.data.records import RecordSet, open_records
from larp_mllm.data.text_data import TextSet, open_text, shipped_text
from larp_mllm.processing.processor import LarpMllmProcessor
from larp_mllm.processing.sequence import TokenSequence

TEXT_LENGTH = 512
"""Ids of a piece of text at most, where --sequence-length does not say it."""
SHORTEST_TEXT = 16
"""Ids of a piece of text at least: in shorter ones nearly every word is predicted without what was before it."""


@dataclass(frozen=True)
class Videos:
    """The token caches of a run and the tokenizer of its codes; caches are None in a run on records alone."""

    train: TokenCache | None
    held_out: TokenCache | None
    tokenizer: LarpTokenizer

    @property
    def captions(self) -> set[str]:
        """All texts that the videos to train on may be called by."""
        phrases = caption_phrases(self.train) if self.train is not None else []
        return {text for texts in phrases for text in texts}


@dataclass(frozen=True)
class Corpus:
    """The data of a run as token sequences for one model; None for what was not given."""

    videos: CaptionedVideos | None
    held_out_videos: CaptionedVideos | None
    records: "RecordSet | Part | None"
    held_out_records: "Part | None"
    text: TextSet | None
    held_out_text: list[TokenSequence]
    held_out_text_name: str
    notes: tuple[str, ...] = ()
    """What is held out and trained on all the same, a line each."""

    @property
    def summary(self) -> dict[str, Any]:
        """What a report says about the data, as plain values."""
        told: dict[str, Any] = {"held_out_text": self.held_out_text_name}
        if self.videos is not None:
            told["tokens"] = {**self.videos.cache.key, "clips": len(self.videos)}
        if self.held_out_videos is not None:
            told["eval_tokens"] = {**self.held_out_videos.cache.key, "clips": len(self.held_out_videos)}
        if self.records is not None:
            told["records"] = {"trained_on": len(self.records), "held_out": len(self.held_out_records or ())}
        if self.text is not None:
            told["text_pieces"] = len(self.text)
        if self.notes:
            told["notes"] = list(self.notes)
        return told


class Part:
    """Some of the sequences of a set, by number."""

    def __init__(self, whole: Any, rows: Sequence[int]):
        self._whole, self.rows = whole, list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TokenSequence:
        return self._whole[self.rows[index]]


def open_videos(tokens: Path | None, eval_tokens: Path | None, tokenizer: str | None, device="cpu") -> Videos:
    """The caches to train and to judge on, and the tokenizer that made both.

    Without eval_tokens every 20th video of `tokens` is held out. Raises ValueError if they do not fit together, or
    nothing names the tokenizer.
    """
    if tokens is None:
        if tokenizer is None:
            raise ValueError(
                "records and text alone do not say which tokenizer makes the codes: give --tokenizer FOLDER (or a token "
                "cache with --tokens)"
            )
        found = LarpTokenizer.from_pretrained(tokenizer, device=device)
        expected = {"tokenizer": found.weight_hash()}
        return Videos(None, None if eval_tokens is None else TokenCache.open(eval_tokens, expected), found)
    if eval_tokens is not None and eval_tokens.resolve() == tokens.resolve():
        raise ValueError(
            f"eval_tokens {eval_tokens} is the same cache as tokens {tokens}, so nothing would be held out: give "
            "--eval-tokens another, or leave it out"
        )
    cache = TokenCache.open(tokens)
    found = cache.load_tokenizer(tokenizer, device)
    if eval_tokens is None:
        return Videos(*cache.hold_out(HELD_OUT), found)
    return Videos(cache, TokenCache.open(eval_tokens, {"tokenizer": cache.key["tokenizer"]}), found)


def open_corpus(
    videos: Videos,
    processor: LarpMllmProcessor,
    positions: int,
    *,
    tasks: Tasks,
    records: Sequence[Path] = (),
    data_root: Path | None = None,
    allow_outside: bool = False,
    stride: int = 1,
    encoded: Path,
    text: Sequence[str] = (),
    eval_text: Sequence[str] = (),
    sequence_length: int | None = None,
) -> Corpus:
    """All data as sequences for a model of so many positions.

    encoded: the folder where the codes of the records' videos are kept. tasks: what is sampled of the data. Raises ValueError
    if a sequence that can be sampled, or that judges, has too many ids. Collective: the first rank encodes the records.
    """
    if sequence_length is not None and sequence_length > positions:
        raise ValueError(
            f"sequence_length is {sequence_length}, but the base model has {positions} positions: lower it, or choose another "
            "--base"
        )
    if sequence_length is not None and sequence_length < SHORTEST_TEXT:
        raise ValueError(
            f"sequence_length is {sequence_length}, but text is cut into pieces of so many ids, and these are too few to learn "
            f"from or to judge by: raise it to {SHORTEST_TEXT} or more"
        )

    def captioned(cache: TokenCache | None) -> CaptionedVideos | None:
        return cache and CaptionedVideos(cache, processor.layout, processor.encode_text, positions, processor.tokenizer)

    found = None
    if records:
        options = dict(
            data_root=data_root, allow_outside=allow_outside, cache=encoded, stride=stride, positions=positions
        )
        found = main_first(lambda: open_records(records, processor, **options))
    train, held_out = captioned(videos.train), captioned(videos.held_out)
    records_to_train, records_to_evaluate = _split(found)
    if train is not None:
        train.check_lengths(train.sampled(tasks))
    if held_out is not None:
        trained = [task for task in (train.tasks if train is not None else ()) if getattr(tasks, task) > 0]
        held_out.check_lengths(held_out.judged(evaluated_tasks(held_out, trained)))
    if sequence_length is not None:
        _check_rows(train, records_to_train, tasks, sequence_length)
    pieces, judged, name = _open_texts(
        tuple(text), tuple(eval_text), processor, sequence_length or min(positions, TEXT_LENGTH)
    )
    notes: list[str] = []
    if videos.train is not None and videos.held_out is not None:
        notes += same_videos(videos.train.names, videos.held_out.names)
    if records_to_evaluate is not None:
        notes += same_videos_of_records(found.names, found.videos, records_to_evaluate.rows)
    if pieces is not None:
        notes += same_text(pieces.pieces, judged.pieces)
    return Corpus(
        train,
        held_out,
        records_to_train,
        records_to_evaluate,
        pieces,
        [judged[index] for index in range(len(judged))],
        name,
        tuple(notes),
    )


def _open_texts(
    text: tuple[str, ...], eval_text: tuple[str, ...], processor: LarpMllmProcessor, length: int
) -> tuple[TextSet | None, TextSet, str]:
    """The text to train on, the text to judge on, and what the latter is called; in pieces of at most `length` ids."""

    def pieces_of(documents: list[str]) -> TextSet:
        return TextSet(documents, processor.encode_text, processor.layout, length)

    pieces = pieces_of(open_text(text)) if text else None
    if eval_text:
        return pieces, pieces_of(open_text(eval_text)), ", ".join(eval_text)
    if pieces is not None and (parts := pieces.hold_out()) is not None:
        train, judged, unit = parts
        return train, judged, f"one {unit} in {HELD_OUT} of {', '.join(text)}"
    return pieces, pieces_of(shipped_text()), "the text that comes with the package"


def _split(records: RecordSet | None) -> "tuple[RecordSet | Part | None, Part | None]":
    """(records to train on, records to judge by): every 20th, with those that equal it.

    Records have no other judges than their own: a list too short to spare any is trained on whole.
    """
    held = held_out_rows(records.contents) if records is not None else []
    if not held:
        return records, None
    return Part(records, sorted(set(range(len(records))) - set(held))), Part(records, held)


def _check_rows(videos: CaptionedVideos | None, records: "RecordSet | Part | None", tasks: Tasks, length: int) -> None:
    """ValueError, before training, if something that can be sampled is longer than a packed row."""
    longest = {}
    if records is not None and tasks.interleaved:
        longest["records"] = max(len(records[number].ids) for number in range(len(records)))
    if videos is not None and (found := videos.longest(videos.sampled(tasks), length)) is not None:
        longest["tokens"] = found[0]
    for name, ids in longest.items():
        if ids > length:
            raise ValueError(
                f"sequence_length is {length}, but the longest sequence of --{name} has {ids} ids, and nothing is truncated: "
                f"raise it to {ids} or more"
            )
