"""What a language model is trained and judged on: token caches, records, and text, opened and held against each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from larp.data.tokens import TokenCache
from larp.engine.ranks import Ranks, barrier
from larp.tokenizer import LarpTokenizer
from larp_mllm.data.dataset import CaptionedVideos, caption_phrases
from larp_mllm.data.records import RecordSet, open_records
from larp_mllm.data.text_data import TextSet, open_text, shipped_text
from larp_mllm.processing import LarpMllmProcessor
from larp_mllm.sequence import TokenSequence

HELD_OUT = 20
"""Every so manieth video, record or piece of text is held out where no other data are given to judge on."""
TEXT_LENGTH = 512
"""Ids of a piece of text at most, where --sequence-length does not say it."""


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
        return told


class Part:
    """Some of the sequences of a set, by number."""

    def __init__(self, whole: Any, rows: Sequence[int]):
        self._whole, self._rows = whole, list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> TokenSequence:
        return self._whole[self._rows[index]]


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
    ranks: Ranks,
    *,
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

    encoded: the folder where the codes of the records' videos are kept. Collective: the first rank encodes them.
    """
    if sequence_length is not None and sequence_length > positions:
        raise ValueError(
            f"sequence_length is {sequence_length}, but the base model has {positions} positions: lower it, or choose another "
            "--base"
        )

    def captioned(cache: TokenCache | None) -> CaptionedVideos | None:
        return cache and CaptionedVideos(cache, processor.layout, processor.encode_text, positions, processor.tokenizer)

    found = None
    if records:
        options = dict(
            data_root=data_root, allow_outside=allow_outside, cache=encoded, stride=stride, positions=positions
        )
        if ranks.is_main:
            found = open_records(records, processor, **options)
        barrier()
        found = open_records(records, processor, **options) if found is None else found
    length = sequence_length or min(positions, TEXT_LENGTH)
    pieces = TextSet(open_text(tuple(text)), processor.encode_text, processor.layout, length) if text else None
    if eval_text:
        judged, name = open_text(tuple(eval_text)), ", ".join(eval_text)
    elif pieces is not None and len(pieces) >= HELD_OUT:
        (pieces, judged), name = pieces.hold_out(HELD_OUT), f"one piece in {HELD_OUT} of {', '.join(text)}"
    else:
        judged, name = shipped_text(), "the text that comes with the package"
    if not isinstance(judged, TextSet):
        judged = TextSet(judged, processor.encode_text, processor.layout, length)
    train = captioned(videos.train)
    if sequence_length is not None:
        _check_rows(train, found, sequence_length)
    # Records have no other judges than their own: a list too short to spare any is trained on whole.
    spare = found is not None and len(found) >= HELD_OUT
    return Corpus(
        train,
        captioned(videos.held_out),
        Part(found, [row for row in range(len(found)) if row % HELD_OUT != HELD_OUT - 1]) if spare else found,
        Part(found, range(HELD_OUT - 1, len(found), HELD_OUT)) if spare else None,
        pieces,
        [judged[index] for index in range(len(judged))],
        name,
    )


def _check_rows(videos: CaptionedVideos | None, records: RecordSet | None, length: int) -> None:
    """ValueError, before training, if something to train on is longer than a packed row."""
    longest = {"records": records.longest} if records is not None else {}
    if videos is not None:
        texts = {max(phrases, key=len): row for row, phrases in enumerate(videos.phrases)}
        longest["tokens"] = max(videos.longest(row) for row in texts.values())
    for name, ids in longest.items():
        if ids > length:
            raise ValueError(
                f"sequence_length is {length}, but the longest sequence of --{name} has {ids} ids, and nothing is truncated: "
                f"raise it to {ids} or more"
            )
