"""All data of a run: token caches, records and text, opened and checked against each other."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from larp.data.datasets import evenly_spaced
from larp.data.token_cache import TokenCache
from larp.engine.distributed import main_first
from larp.models.tokenizer import LarpTokenizer
from larp_mllm.data.dataset import CaptionedVideos, Tasks, evaluated_tasks
from larp_mllm.data.leakage import (
    HELD_OUT,
    content_digest,
    held_out_rows,
    same_text,
    same_videos,
    same_videos_of_records,
)
from larp_mllm.data.phrases import Phrases, drop_without_text
from larp_mllm.data.records import RecordSet, open_records
from larp_mllm.data.text_data import TextSet, open_text, shipped_text
from larp_mllm.processing.processor import LarpMllmProcessor
from larp_mllm.processing.token_sequence import TokenSequence

import torch

TEXT_LENGTH = 512
"""Most ids of a piece of text without --sequence-length."""
_MOST_CAPTIONS = 100_000
SHORTEST_TEXT = 16
"""Lowest --sequence-length with text: in shorter pieces nearly every word is predicted without what precedes it."""


@dataclass(frozen=True)
class TokenCaches:
    """The token caches of a run and the tokenizer that made them; both caches are None in a run on records alone."""

    train: TokenCache | None
    held_out: TokenCache | None
    tokenizer: LarpTokenizer

    @property
    def captions(self) -> set[str]:
        """The texts of the training videos, see `Phrases`; of at most 100,000 evenly spaced clips."""
        if self.train is None:
            return set()
        phrases = Phrases(drop_without_text(self.train))
        rows = evenly_spaced(range(len(phrases)), _MOST_CAPTIONS)
        return {text for row in rows for text in phrases[row]}


@dataclass(frozen=True)
class Corpus:
    """The data of a run as token sequences for one model; None for what was not given."""

    videos: CaptionedVideos | None
    held_out_videos: CaptionedVideos | None
    records: RecordSet | None
    held_out_records: RecordSet | None
    text: TextSet | None
    held_out_text: list[TokenSequence]
    held_out_text_name: str
    notes: tuple[str, ...] = ()
    """What is wrong with shards of records, leakage, and left-out clips, one line each."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """A hash of the contents of "tokens", "records" and "text", as far as given, by which a resumed run notices other data."""

    @property
    def summary(self) -> dict[str, Any]:
        """The data in a report, as plain values."""
        summary: dict[str, Any] = {"held_out_text": self.held_out_text_name}
        if self.videos is not None:
            summary["tokens"] = {**self.videos.cache.key, "clips": len(self.videos)}
        if self.held_out_videos is not None:
            summary["eval_tokens"] = {**self.held_out_videos.cache.key, "clips": len(self.held_out_videos)}
        if self.records is not None:
            summary["records"] = {"trained_on": len(self.records), "held_out": len(self.held_out_records or ())}
        if self.text is not None:
            summary["text_pieces"] = len(self.text)
        if self.notes:
            summary["notes"] = list(self.notes)
        return summary


def open_token_caches(
    tokens: Path | None,
    eval_tokens: Path | None,
    tokenizer: str | None,
    device: torch.device | str = "cpu",
    more: Sequence[Path] = (),
) -> TokenCaches:
    """Open the caches to train and to evaluate on, and load the tokenizer that made both.

    Without `eval_tokens` every 20th video of `tokens` is held out. `more` are further caches to train on. Raises ValueError if the
    caches do not belong together, if neither `tokens` nor `tokenizer` is given, and for `more` without `tokens`.
    """
    if more and tokens is None:
        raise ValueError(
            f"--more-tokens {more[0]} is joined to the cache of --tokens, which is not given: give it with --tokens"
        )
    if tokens is None:
        if tokenizer is None:
            raise ValueError(
                "records and text alone do not say which tokenizer makes the codes: give --tokenizer FOLDER (or a token "
                "cache with --tokens)"
            )
        loaded = LarpTokenizer.from_pretrained(tokenizer, device=device)
        expected = {"tokenizer": loaded.weight_hash()}
        return TokenCaches(None, None if eval_tokens is None else TokenCache.open(eval_tokens, expected), loaded)
    if eval_tokens is not None and eval_tokens.resolve() == tokens.resolve():
        raise ValueError(
            f"eval_tokens {eval_tokens} is the same cache as tokens {tokens}, so nothing would be held out: give "
            "--eval-tokens another, or leave it out"
        )
    cache = TokenCache.open(tokens)
    loaded = cache.load_tokenizer(tokenizer, device)
    held_out = None
    if eval_tokens is None:
        cache, held_out = cache.hold_out(HELD_OUT)
    for folder in more:
        cache = cache.joined(TokenCache.open(folder))
    if held_out is not None:
        return TokenCaches(cache, held_out, loaded)
    return TokenCaches(cache, TokenCache.open(eval_tokens, {"tokenizer": cache.key["tokenizer"]}), loaded)


def open_corpus(
    caches: TokenCaches,
    processor: LarpMllmProcessor,
    positions: int,
    *,
    tasks: Tasks,
    records: Sequence[str | Path] = (),
    data_root: Path | None = None,
    allow_outside: bool = False,
    stride: int = 1,
    encoded: Path,
    text: Sequence[str] = (),
    eval_text: Sequence[str] = (),
    sequence_length: int | None = None,
) -> Corpus:
    """Make token sequences of all data. Collective: the first rank encodes the videos of the records.

    Args:
        positions: of the base model.
        tasks: what is sampled from the data.
        records, data_root, allow_outside, stride: see `open_records`.
        encoded: folder for the codes of the records' videos.
        text, eval_text: specs of text, see `open_text`.
        sequence_length: most ids of a packed row, and of a piece of text.

    Raises ValueError if a sequence that can be sampled or evaluated has more ids than `positions` or `sequence_length`.
    """
    _check_sequence_length(sequence_length, positions)

    def captioned(cache: TokenCache | None) -> CaptionedVideos | None:
        return cache and CaptionedVideos(cache, processor.layout, processor.encode_text, positions, processor.tokenizer)

    opened = None
    if records:
        options = dict(
            data_root=data_root, allow_outside=allow_outside, cache=encoded, stride=stride, positions=positions
        )
        opened = main_first(lambda: open_records(records, processor, **options))
    train, held_out = captioned(caches.train), captioned(caches.held_out)
    held = held_out_rows(opened.contents) if opened is not None else []
    train_records, held_out_records = _split(opened, held)
    if train is not None:
        train.check_lengths(train.training_candidates(tasks, positions))
    if held_out is not None:
        trained = [task for task in (train.tasks if train is not None else ()) if getattr(tasks, task) > 0]
        held_out.check_lengths(held_out.evaluation_candidates(evaluated_tasks(held_out, trained), positions))
    if sequence_length is not None:
        _check_packed_lengths(train, train_records, tasks, sequence_length)
    pieces, held_out_pieces, name = _open_texts(
        tuple(text), tuple(eval_text), processor, sequence_length or min(positions, TEXT_LENGTH)
    )
    return Corpus(
        train,
        held_out,
        train_records,
        held_out_records,
        pieces,
        [held_out_pieces[index] for index in range(len(held_out_pieces))],
        name,
        tuple(_notes(caches, train, held_out, opened, held, pieces, held_out_pieces)),
        _digests(caches.train, opened, pieces),
    )


def _check_sequence_length(sequence_length: int | None, positions: int) -> None:
    """Raise ValueError for a length of rows that the base, or the pieces of text, do not fit."""
    if sequence_length is not None and sequence_length > positions:
        raise ValueError(
            f"sequence_length is {sequence_length}, but the base model has {positions} positions: lower it, or choose another "
            "--base"
        )
    if sequence_length is not None and sequence_length < SHORTEST_TEXT:
        raise ValueError(
            f"sequence_length is {sequence_length}, but text is cut into pieces of so many ids, which is too short to learn "
            f"from: raise it to {SHORTEST_TEXT} or more"
        )


def _notes(
    caches: TokenCaches,
    train: CaptionedVideos | None,
    held_out: CaptionedVideos | None,
    records: RecordSet | None,
    held: list[int],
    text: TextSet | None,
    held_out_text: TextSet,
) -> list[str]:
    """Say what is left out of the data, and what is both trained on and held out."""
    notes = list(records.notes) if records is not None else []
    for cache, videos in ((caches.train, train), (caches.held_out, held_out)):
        for reason, dropped in videos.left_out.items() if videos is not None else ():
            if dropped:
                notes.append(f"{dropped} of {len(cache)} clips are left out: {reason}")
    if caches.train is not None and caches.held_out is not None:
        notes += same_videos(caches.train.names, caches.held_out.names)
    if held:
        notes += same_videos_of_records(records.names, records.videos, held)
    if text is not None:
        notes += same_text(text.pieces, held_out_text.pieces)
    return notes


def _digests(tokens: TokenCache | None, records: RecordSet | None, text: TextSet | None) -> dict[str, str]:
    """Return `Corpus.digests`."""
    contents = {
        "tokens": tokens and [tokens.key, len(tokens)],
        "records": records and records.digest,
        "text": text and content_digest(text.pieces),
    }
    return {
        name: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
        for name, value in contents.items()
        if value is not None
    }


def _open_texts(
    text: tuple[str, ...], eval_text: tuple[str, ...], processor: LarpMllmProcessor, length: int
) -> tuple[TextSet | None, TextSet, str]:
    """Return the text to train on, the held-out text and the name of the latter, in pieces of at most `length` ids."""

    def pieces_of(documents: list[str]) -> TextSet:
        return TextSet(documents, processor.encode_text, processor.layout, length)

    pieces = pieces_of(open_text(text)) if text else None
    if eval_text:
        return pieces, pieces_of(open_text(eval_text)), ", ".join(eval_text)
    if pieces is not None and (parts := pieces.hold_out()) is not None:
        train, held_out, unit = parts
        return train, held_out, f"one {unit} in {HELD_OUT} of {', '.join(text)}"
    return pieces, pieces_of(shipped_text()), "the text that comes with the package"


def _split(records: RecordSet | None, held: list[int]) -> tuple[RecordSet | None, RecordSet | None]:
    """Return (records to train on, held-out records) for the rows to hold out, which may be none."""
    if not held:
        return records, None
    return records.select(sorted(set(range(len(records))) - set(held))), records.select(held)


def _check_packed_lengths(videos: CaptionedVideos | None, records: RecordSet | None, tasks: Tasks, length: int) -> None:
    """Raise ValueError if a sequence that can be sampled is longer than a packed row."""
    longest = {}
    if records is not None and tasks.interleaved:
        longest["records"] = records.longest
    if videos is not None and (found := videos.longest(videos.training_candidates(tasks, length), length)) is not None:
        longest["tokens"] = found[0]
    for name, ids in longest.items():
        if ids > length:
            raise ValueError(
                f"sequence_length is {length}, but the longest sequence of --{name} has {ids} ids, and nothing is truncated: "
                f"raise it to {ids} or more"
            )
