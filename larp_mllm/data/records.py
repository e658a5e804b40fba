"""JSONL records of text and videos in any order, and chats with videos, as token sequences.

    {"text": "first <video>, then <video>", "videos": ["a.mp4", {"path": "b.mp4", "start": 2.5, "loss": false}]}
    {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What is it?"}]},
                  {"role": "assistant", "content": "A wave."}]}

"loss", true or false, says what is learned. A record of the first form is learned whole by default; the "loss" of a video
overrides that of the record. Of a chat the assistant's messages are learned by default, and nothing with "loss": false in
the record; the "loss" of a message overrides that, and the "loss" of a part overrides both. An "id" of a record is ignored.
Videos are names of files below the data root, by default the folder of the JSONL file, or SHARD.tar/MEMBER there. In place of a
JSONL file, wds:PATTERN stands for the .json of each sample of WebDataset shards, which names members of its own shard, and hf-disk:FOLDER for the
rows of a saved data set, see disk_records.py.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from larp.data.listing import text_lines
from larp.data.shards import Shards
from larp.data.tar_index import ShardIndex, is_remote
from larp.files import user_path
from larp_mllm.checks import check_start
from larp_mllm.data.disk_records import open_disk_records, with_videos
from larp_mllm.data.leakage import content_digest, content_numbers
from larp_mllm.data.record_codes import Excerpt, encode_excerpts, find_video
from larp_mllm.processing.chat import chat_parts, chat_segments, check_loss, check_text
from larp_mllm.processing.processor import LarpMllmProcessor
from larp_mllm.processing.token_sequence import (
    PLACEHOLDER,
    TokenSequence,
    check_length,
    check_placeholders,
    encode,
    interleaved,
)

from torch import Tensor
from tqdm import tqdm

_SHOWN = 5
"""Most bad records that an error lists."""
_FORMS = '{"messages": [...]}, or {"text": "... <video> ...", "videos": [...]}'


class RecordSet:
    """Token sequences of records, `records[i]`; `names` holds FILE:LINE of each and `videos` its video files.

    notes: what is wrong with shards, one line each.
    """

    def __init__(
        self,
        sequences: Iterable[TokenSequence],
        names: Sequence[str],
        videos: Sequence[Collection[Path]] = (),
        notes: Sequence[str] = (),
    ):
        # int32: the ids stay in memory during the whole training.
        self._rows = [(sequence.ids.int(), sequence.labels.int()) for sequence in sequences]
        self.names, self.notes = tuple(names), tuple(notes)
        self.videos = tuple(map(frozenset, videos)) or (frozenset(),) * len(self.names)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> TokenSequence:
        ids, labels = self._rows[number]
        return TokenSequence(ids.long(), labels.long())

    def select(self, rows: Sequence[int]) -> "RecordSet":
        """Return a set of the given rows without the notes."""
        chosen = RecordSet((), [self.names[row] for row in rows], [self.videos[row] for row in rows])
        chosen._rows = [self._rows[row] for row in rows]
        return chosen

    @property
    def longest(self) -> int:
        """The number of ids of the longest record; 0 without records."""
        return max((len(ids) for ids, _ in self._rows), default=0)

    @property
    def digest(self) -> str:
        """A hash of all records, see `content_digest`."""
        return content_digest(tensor for row in self._rows for tensor in row)

    @property
    def contents(self) -> list[int]:
        """A number for each record, equal for records of equal ids, see `content_numbers`."""
        return content_numbers(ids for ids, _ in self._rows)


def open_records(
    paths: str | Path | Sequence[str | Path],
    processor: LarpMllmProcessor,
    *,
    data_root: str | Path | None = None,
    allow_outside: bool = False,
    cache: str | Path,
    stride: int = 1,
    positions: int | None = None,
) -> RecordSet:
    """Read JSONL files of records, encode their videos, and return the token sequences.

    Args:
        paths: one file or several; wds:PATTERN or hf-disk:FOLDER in place of a file.
        processor: its video tokenizer encodes, on the device where it is.
        data_root: the folder that video names are relative to and must lie in, links resolved; None: that of each file.
        allow_outside: accept videos outside of the data root.
        cache: folder for the codes, see larp_mllm/data/record_codes.py. Once one process has run, others only read it.
        stride: every n-th frame of a video is a frame of its clip. A clip begins at the "start" of its video (seconds), or is
            the middle of the video.
        positions: of the base model; None: no limit.

    Raises ValueError that lists the first bad records as FILE:LINE with what is wrong: another form, unknown keys, unequal
    numbers of placeholders and videos, URLs, videos that are missing, outside of the root, unreadable or too short, records
    without anything to learn, and records of more ids than `positions`.
    """
    problems, notes, records = _Problems(), [], []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        records += _read(str(path), data_root, allow_outside, problems, notes)
    problems.check()
    excerpts = dict.fromkeys(video for record in records for video in record.videos)
    codes, reasons = encode_excerpts(excerpts, processor.video_tokenizer, Path(cache), stride)
    sequences = _sequences(records, processor, codes, reasons, positions, problems)
    shown = [[video.path for video in record.videos] for record in records]
    found = RecordSet(sequences, [record.name for record in records], shown, notes)
    problems.check()
    return found


class _Problems:
    """Collects errors of records, so that one run reports several."""

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            self.found.append(str(error))

    def check(self) -> None:
        """Raise ValueError if there were errors."""
        if len(self.found) == 1:
            raise ValueError(self.found[0])
        if self.found:
            more = len(self.found) - _SHOWN
            lines = [*self.found[:_SHOWN], *([f"... and {more} more"] if more > 0 else [])]
            raise ValueError("\n  ".join([f"{len(self.found)} bad records:", *lines]))


@dataclass(frozen=True)
class _Interleaved:
    """A checked record of text with placeholders and videos; each of `parts` is (video, learned)."""

    name: str
    text: str
    loss: bool
    parts: tuple[tuple[Excerpt, bool], ...]

    @property
    def videos(self) -> list[Excerpt]:
        return [video for video, _ in self.parts]

    def sequence(self, processor: LarpMllmProcessor, codes: Mapping[Excerpt, Tensor]) -> TokenSequence:
        videos = [(codes[video].tolist(), loss) for video, loss in self.parts]
        segments = interleaved(self.text, videos, processor.encode_text, self.loss, self.name)
        return encode(segments, processor.layout)


@dataclass(frozen=True)
class _Chat:
    """A checked record of messages; the "video" of each video part is an Excerpt."""

    name: str
    messages: list[dict[str, Any]]

    @property
    def videos(self) -> list[Excerpt]:
        parts = [part for message in self.messages for part in message["content"]]
        return [part["video"] for part in parts if part["type"] == "video"]

    def sequence(self, processor: LarpMllmProcessor, codes: Mapping[Excerpt, Tensor]) -> TokenSequence:
        def codes_of(part: dict) -> list[int]:
            return codes[part["video"]].tolist()

        segments = chat_segments(self.messages, processor.tokenizer, processor.encode_text, codes_of, self.name)
        return encode(segments, processor.layout, add_special_tokens=False)


def _sequences(records, processor, codes, reasons, positions: int | None, problems) -> Iterator[TokenSequence]:
    for record in tqdm(records, desc="reading records", unit="record", delay=1):
        with problems.collected():
            if bad := next((video for video in record.videos if video in reasons), None):
                raise ValueError(f"{record.name}: {reasons[bad]}")
            yield _sequence(record, processor, codes, positions)


def _sequence(record: _Interleaved | _Chat, processor, codes, positions: int | None) -> TokenSequence:
    sequence = record.sequence(processor, codes)
    if not sequence.targets:
        raise ValueError(
            f'{record.name}: nothing in it is learned: set "loss" to true for a text or video, or leave it out'
        )
    if positions is not None:
        length, span = len(sequence.ids), processor.video_tokenizer.num_tokens + 2
        mostly_video = 2 * span * len(record.videos) > length
        remedy = f"give it fewer videos ({span} ids each)" if mostly_video else "shorten the text"
        check_length(length, positions, record.name, remedy)
    return sequence


def _read(
    source: str, data_root, allow_outside: bool, problems: _Problems, notes: list[str]
) -> list[_Interleaved | _Chat]:
    if source.startswith("wds:"):
        return _read_shards(source, data_root, allow_outside, problems, notes)
    if source.startswith("hf-disk:"):
        return _read_disk(source, data_root, allow_outside, problems)
    path = user_path(source)
    try:
        lines = text_lines(path, "records")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    root = _data_root(data_root, path.parent)
    records, count = [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        count += 1
        with problems.collected():
            records.append(_record(_parsed(line, name := f"{path}:{number}"), name, root, allow_outside))
    if not count:
        raise ValueError(f"{path}: holds no record; a line is {_FORMS}")
    return records


def _data_root(given, default: Path) -> Path:
    root = default if given is None else user_path(given)
    if not root.is_dir():
        raise ValueError(f"--data-root {root}: there is no such folder: give the one that holds the videos")
    return root


def _read_disk(spec: str, data_root, allow_outside: bool, problems: _Problems) -> list[_Interleaved | _Chat]:
    folder, rows = open_disk_records(spec)
    root, records = _data_root(data_root, folder), []
    for name, given, videos in rows:
        with problems.collected():
            records.append(_record(with_videos(name, given, videos), name, root, allow_outside))
    return records


def _read_shards(
    spec: str, data_root, allow_outside: bool, problems: _Problems, notes: list[str]
) -> list[_Interleaved | _Chat]:
    shards, records = Shards(spec.partition(":")[2], spec), []
    notes += shards.notes
    for index in shards.indices:
        # Several videos of one key share its .json; no .json begins at 0, where the tar file does.
        offsets = index.columns["json_offsets"].tolist()
        rows = {offset or -row: row for row, offset in reversed(list(enumerate(offsets)))}
        for row in sorted(rows.values()):
            name = f"{index.member(row)}: .json"
            with problems.collected():
                if (data := index.json(row)) is None:
                    raise ValueError(f"{name} is missing: a sample of records is KEY.mp4 with KEY.json, {_FORMS}")
                try:
                    text = data.decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{name}: not UTF-8 text ({error}): save it as UTF-8") from None
                shard = index if is_remote(index.shard) else Path(index.shard)
                root = shard if data_root is None else user_path(data_root)
                records.append(_record(_parsed(text, name), name, root, allow_outside))
    return records


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: broken JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # thousands of digits or brackets
        raise ValueError(f"{where}: broken JSON: {error}") from None
    if not isinstance(given, dict) or not given:
        raise ValueError(f"{where}: a record must be an object, {_FORMS}, got {line.strip()[:40]}")
    return given


def _record(given: dict[str, Any], name: str, root: Path | ShardIndex, allow_outside: bool) -> _Interleaved | _Chat:
    def excerpt(video: Any, start: Any, where: str) -> Excerpt:
        return Excerpt(find_video(video, root, allow_outside, where), check_start(start, where))

    if "messages" in given:
        _check_keys(given, {"messages", "loss", "id"}, name)
        return _Chat(name, _with_excerpts(given["messages"], check_loss(given, True, name), name, excerpt))
    _check_keys(given, {"text", "videos", "loss", "id"}, name)
    if "text" not in given:
        raise ValueError(f"{name}: neither messages nor a text: a record is {_FORMS}")
    text, loss = check_text(given["text"], f"{name}: text"), check_loss(given, True, name)
    videos = given.get("videos", [])
    if not isinstance(videos, list):
        raise ValueError(f"{name}: videos must be a list, got {type(videos).__name__}")
    if not text.strip():
        raise ValueError(f"{name}: the record is empty: give it a text with {PLACEHOLDER} where a video stands")
    check_placeholders(text.count(PLACEHOLDER), len(videos), name)
    parts = []
    for number, video in enumerate(videos, 1):
        where = f"{name}, video {number}"
        video = video if isinstance(video, dict) else {"path": video}
        _check_keys(video, {"path", "start", "loss"}, where)
        parts.append((excerpt(video.get("path"), video.get("start"), where), check_loss(video, loss, where)))
    return _Interleaved(name, text, loss, tuple(parts))


def _with_excerpts(messages: Any, learned: bool, name: str, excerpt) -> list[dict[str, Any]]:
    found = []
    checked = chat_parts(messages, name, learned)
    for number, (message, parts) in enumerate(zip(messages, checked, strict=True), 1):
        content = []
        for part in parts:
            if part.text is not None:
                content.append({"type": "text", "text": part.text, "loss": part.loss})
                continue
            where = f"{name}: message {number}"
            video = excerpt(part.given.get("video", part.given.get("path")), part.given.get("start"), where)
            content.append({"type": "video", "video": video, "loss": part.loss})
        found.append({"role": message["role"], "content": content})
    return found


def _check_keys(given: dict[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(given) - known):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
