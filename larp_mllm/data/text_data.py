"""Plain text, mixed in so that a language model keeps what it knows: documents, cut into pieces.

- `txt:FILE`: documents separated by blank lines; all line ends become "\\n"
- `jsonl:FILE`: the field "text" of each line
- `hf:NAME[,config=NAME][,split=train][,column=text]`: a data set of the hub (owner/name) or a folder of its files, read by
  the package `datasets` (pip install 'larp-mllm[text]')
"""

import copy
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError

from larp.data.listing import text_lines
from larp.files import user_text
from larp.hub_files import check_reachable
from larp_mllm.data.leakage import HELD_OUT, content_numbers, held_out_rows
from larp_mllm.model.vocabulary import IGNORE
from larp_mllm.processing.chat import check_text
from larp_mllm.processing.token_sequence import Layout, TokenSequence

import torch
from tqdm import tqdm

if TYPE_CHECKING:
    import datasets

SHIPPED = Path(__file__).parent / "held_out_text.txt"
"""Plain English about everyday things, for runs without held-out text of their own."""
ENOUGH = 256
"""Fewest held-out ids whose perplexity is meaningful."""
_HUB_OPTIONS = {"config": None, "split": "train", "column": "text"}


class TextSet:
    """Documents as token sequences of at most `length` ids, all of them learned.

    A longer document is cut into pieces that overlap by one id, so that every id but a document's first is predicted
    once. Begin and end ids are added to the document, not to each piece.

    Args:
        documents: texts; those of white space alone are left out.
        encode_text: text -> text ids, as `LarpMllmProcessor.encode_text`.
        layout: with the base's begin and end ids.
        length: most ids of a piece; at least 2, so that one can be predicted.

    Raises ValueError for a shorter length, and if no document holds text.
    """

    def __init__(self, documents: Sequence[str], encode_text: Callable[[str], list[int]], layout: Layout, length: int):
        if length < 2:
            raise ValueError(f"pieces of text must have at least 2 ids, got {length}: raise --sequence-length")
        self.pieces: list[torch.Tensor] = []
        """The ids of each piece, int32."""
        self._documents: list[int] = []
        begin, end = ([] if id is None else [id] for id in (layout.bos, layout.eos))
        for document in tqdm(documents, desc="reading text", unit="document", delay=1):
            if document.strip():
                # int32: the ids stay in memory during the whole training.
                ids = torch.tensor([*begin, *encode_text(document), *end], dtype=torch.int32)
                starts = range(0, max(1, len(ids) - 1), length - 1)
                self.pieces += [ids[start : start + length] for start in starts]
                number = self._documents[-1] + 1 if self._documents else 0
                self._documents += [number] * len(starts)
        if not self.pieces:
            raise ValueError(f"none of the {len(documents)} documents holds text: give others")

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, number: int) -> TokenSequence:
        ids = self.pieces[number].long()
        labels = ids.clone()
        labels[:1] = IGNORE
        return TokenSequence(ids, labels)

    @property
    def size(self) -> int:
        """The number of ids of all pieces."""
        return sum(map(len, self.pieces))

    def hold_out(self, every: int = HELD_OUT, enough: int = ENOUGH) -> tuple["TextSet", "TextSet", str] | None:
        """Split into (training text, held-out text, unit): the unit held out is every n-th "document", else "piece".

        Pieces are the unit if the documents have fewer than `enough` ids or more than a quarter of all; None if that holds
        for pieces, too. Equal documents or pieces stay on one side.
        """
        whole: dict[int, list[torch.Tensor]] = {}
        for piece, number in zip(self.pieces, self._documents, strict=True):
            whole.setdefault(number, []).append(piece)
        contents = dict(zip(whole, content_numbers(torch.cat(pieces) for pieces in whole.values()), strict=True))
        by_document = [contents[number] for number in self._documents]
        for unit, numbers in (("document", by_document), ("piece", content_numbers(self.pieces))):
            held = set(held_out_rows(numbers, every))
            held_out = self._select([row for row in range(len(self)) if row in held])
            if enough <= held_out.size <= self.size // 4:
                return self._select([row for row in range(len(self)) if row not in held]), held_out, unit
        return None

    def _select(self, rows: list[int]) -> "TextSet":
        selected = copy.copy(self)
        selected.pieces = [self.pieces[row] for row in rows]
        selected._documents = [self._documents[row] for row in rows]
        return selected


def shipped_text() -> list[str]:
    """Return the documents of the held-out text that comes with the package."""
    return [SHIPPED.read_text(encoding="utf-8").strip()]


def open_text(specs: str | Sequence[str]) -> list[str]:
    """Return the documents of all specs in order; the top of this file lists the specs.

    Raises ValueError that names the spec, or FILE:LINE, for an unknown kind or option, a file that is missing or not UTF-8,
    a line without text, and a data set that cannot be loaded. Code from a data set is never run.
    """
    documents: list[str] = []
    for spec in [specs] if isinstance(specs, str) else specs:
        kind, colon, rest = spec.partition(":")
        if kind not in _READERS or not colon or not rest:
            raise ValueError(f"text {spec!r}: give txt:FILE, jsonl:FILE or hf:NAME")
        found = _READERS[kind](rest, spec)
        if not any(document.strip() for document in found):
            raise ValueError(f"text {spec}: holds no text")
        documents += found
    return documents


def _read_txt(path: str, spec: str) -> list[str]:
    return [document for document in re.split(r"\n\s*\n", "".join(_lines(path, spec))) if document.strip()]


def _read_jsonl(path: str, spec: str) -> list[str]:
    documents = []
    for number, line in enumerate(_lines(path, spec), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: broken JSON: {error}") from None
        if not isinstance(row, dict) or "text" not in row:
            raise ValueError(f'{path}:{number}: each line must be an object with a "text", got {line.strip()[:40]}')
        documents.append(check_text(row["text"], f"{path}:{number}: text"))
    return documents


def _lines(path: str, spec: str) -> list[str]:
    """Return the lines of a file with all line ends as "\\n"."""
    try:
        text = "".join(text_lines(path, f"text {spec}"))
    except OSError as error:
        raise ValueError(f"text {spec}: {path} cannot be read: {error.strerror}") from error
    # str.splitlines() also splits at U+2028 and similar characters.
    return io.StringIO(text, newline=None).readlines()


def _read_hub(rest: str, spec: str) -> list[str]:
    name, options = _hub_options(user_text(rest), spec)
    # Asked while the package is imported, which takes seconds.
    hub = None if Path(name).is_dir() else ThreadPoolExecutor(1).submit(check_reachable, name, kind="dataset")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"text {spec}: data sets of the hub need the package datasets: pip install 'larp-mllm[text]', or give txt:FILE "
            "or jsonl:FILE"
        ) from error
    load = partial(load_dataset, name, options["config"], split=options["split"])
    try:
        rows = load() if hub is None else _load_hub(load, hub)
        columns = list(rows.column_names)
    except Exception as error:  # datasets and the hub raise many types
        said = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise ValueError(
            f"text {spec}: the data set cannot be loaded ({type(error).__name__}: {said}). Check its name, config= and split=; "
            "without network, fill the local cache first, or give the folder of its files, txt:FILE or jsonl:FILE"
        ) from error
    if options["column"] not in columns:
        raise ValueError(f"text {spec}: has no column {options['column']!r}; column= one of {', '.join(columns)}")
    texts = rows[options["column"]]
    return [check_text(text, f"text {spec}: row {number}") for number, text in enumerate(texts)]


def _load_hub(load: Callable[[], "datasets.Dataset"], hub: Future) -> "datasets.Dataset":
    """Load a data set from the local cache, else from the hub if it answers. Raises OSError if it does not."""
    with _from_cache_alone(), suppress(Exception):  # datasets and the hub raise many types
        return load()
    with suppress(HTTPError):  # it answers; datasets says what is wrong
        hub.result()
    return load()


@contextmanager
def _from_cache_alone() -> Iterator[None]:
    """Keep `datasets` away from a hub that does not answer, for which it would wait for minutes."""
    from datasets import config

    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _hub_options(rest: str, spec: str) -> tuple[str, dict[str, str | None]]:
    name, *pieces = rest.split(",")
    options: dict[str, str | None] = dict(_HUB_OPTIONS)
    for piece in pieces:
        key, _, value = piece.partition("=")
        if key in options and not value:
            raise ValueError(f"text {spec}: {key}= has no value: write {key}=..., or leave it out")
        if key not in options:
            raise ValueError(f"text {spec}: {piece!r} is no option; known are {', '.join(f'{k}=' for k in options)}")
        options[key] = value
    # `datasets` takes a bare name for one of its own readers, which would open any file of the current folder.
    if not (name and Path(name).is_dir()) and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(
            f"text {spec}: {name or 'nothing'} is neither a name of the hub (owner/name) nor a folder; URLs are not opened"
        )
    return name, options


_READERS = {"txt": _read_txt, "jsonl": _read_jsonl, "hf": _read_hub}
