"""Where the members of a tar file lie: its headers are read once, and the index is kept beside it.

With the index a tar file is read at any place, so that shards have a length, a split, a shuffled order and a position to
resume at as folders have. A file in the way of WebDataset: members KEY.mp4, KEY.txt, KEY.json and KEY.cls are one sample.

    00000.tar.larp-index     safetensors, see `ShardIndex`; in the cache folder where the folder of the shard takes no files
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import tarfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

from larp.data.listing import captions_of, join_captions
from larp.data.shapes import cache_folder
from larp.data.stored_video import StoredVideo
from larp.data.string_columns import pack_strings, unpack_strings
from larp.data.video import VIDEO_SUFFIXES
from larp.files import replacing

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_VERSION = 2
_BLOCK = tarfile.BLOCKSIZE
_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)
"""Key and extension of a member, as WebDataset splits them: at the first dot of the last part."""
_PIECE = re.compile(r"(\d{6,})_\d+")
"""Keys of video2dataset's pieces of one video; the first group is the key of the video."""
_VERSIONS = re.compile(
    "size|etag|lastmodified|mtime|modified|updated|created|generation|md5hash|contentmd5|digest|blobid"
)
"""What a remote file system says about the version of a file, in lower case without - and _."""
_MAX_TEXT = 2**24
_TEXTS = ("txt", "json", "cls")
_NUMBERS = ("offsets", "sizes", "labels", "hashes", "json_offsets", "json_sizes")
"""Columns of an index, see `ShardIndex.columns`."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


def is_remote(shard: str) -> bool:
    """Whether a shard is named by a protocol, such as s3:// or https://, and not by a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", shard) is not None


def open_remote(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it. Raises ValueError if its package is missing."""
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url}: cannot be opened ({error}): install what it names, or copy the shards") from error


@dataclass(frozen=True)
class TarMember(StoredVideo):
    """A video in a tar file."""

    shard: str
    """Path or URL."""
    member: str
    """Its name; of the second one of a name with "#2" at the end, and so on."""
    offset: int
    size: int
    mtime_ns: int
    """Of the tar file; of a remote one a number that changes with its contents."""

    def __str__(self) -> str:
        return f"{self.shard}/{self.member}"

    @property
    def name(self) -> str:
        """Last part of the member's name."""
        return self.member.rpartition("/")[2]

    def stat(self) -> SimpleNamespace:
        """Return the size of the member and the time of the tar file."""
        return SimpleNamespace(st_size=self.size, st_mtime_ns=self.mtime_ns)

    def read(self) -> bytes:
        """Return the bytes of the member. Raises OSError if the tar file was changed since it was listed."""
        if not is_remote(self.shard) and os.stat(self.shard).st_mtime_ns != self.mtime_ns:
            raise OSError(f"{self.shard} was changed since it was listed: run again")
        return read_span(self.shard, self.offset, self.size)


def read_span(shard: str, offset: int, size: int) -> bytes:
    """Return `size` bytes of a shard from `offset` on. Raises OSError if it is shorter."""
    if is_remote(shard):
        system, path = open_remote(shard)
        data = system.cat_file(path, start=offset, end=offset + size)
    else:
        with open(shard, "rb") as file:
            file.seek(offset)
            data = file.read(size)
    if len(data) < size:
        raise OSError(f"{shard} ends within it: it was changed or cut off since it was listed")
    return data


@dataclass(frozen=True)
class ShardIndex:
    """The videos of one tar file."""

    shard: str
    state: tuple[int, int]
    """Size in bytes and modification time in ns, see `TarMember.mtime_ns`."""
    columns: dict[str, Tensor]
    """offsets, sizes, labels (into `classes`, -1: none), hashes (of what a split must not divide), json_offsets and json_sizes
    (size 0: none), int64 (n,); and strings: names and captions."""
    classes: tuple[str, ...]
    problems: tuple[tuple[str, str], ...]
    """(what is wrong, where), see `larp.data.shards`."""

    def __len__(self) -> int:
        return len(self.columns["offsets"])

    def text(self, column: str, row: int) -> str | None:
        """Return a string of the column "names" or "captions"."""
        return unpack_strings(self.columns[column], self.columns[f"{column}_ends"], torch.tensor([row]))[0]

    def member(self, row: int) -> TarMember:
        """Return the video of a row."""
        name, offset, size = self.text("names", row), self.columns["offsets"][row], self.columns["sizes"][row]
        return TarMember(self.shard, name, int(offset), int(size), self.state[1])

    @cached_property
    def rows(self) -> dict[str, int]:
        """The row of each video by its name, without a leading "./"."""
        return {posixpath.normpath(self.text("names", row)): row for row in range(len(self))}

    def json(self, row: int) -> bytes | None:
        """Return the .json of a sample; None if it has none."""
        size = int(self.columns["json_sizes"][row])
        return read_span(self.shard, int(self.columns["json_offsets"][row]), size) if size else None


def group_of(key: str) -> str:
    """Return what a split keeps together: the video that a piece of video2dataset is cut from, else the key."""
    found = _PIECE.fullmatch(key.rpartition("/")[2])
    return found[1] if found else key


def open_index(shard: str, caption: str = "") -> ShardIndex:
    """Return the index of a tar file, read from its headers if there is none of its present state.

    caption: the field of .json that holds captions; "": .txt, or the field "caption" where there is no .txt. Raises OSError
    if the shard cannot be read.
    """
    state = _state(shard)
    plain = re.sub(r"[^\w.-]+", "_", caption)
    beside = Path(f"{shard}{'.' if plain else ''}{plain}.larp-index")
    digest = hashlib.sha256(str(shard if is_remote(shard) else Path(shard).resolve()).encode()).hexdigest()[:20]
    cached = cache_folder() / "shards" / f"{digest}{plain}.larp-index"
    places = [cached] if is_remote(shard) else [beside, cached]
    for place in places:
        if (found := _load(place, shard, state, caption)) is not None:
            return found
    if is_remote(shard):
        system, path = open_remote(shard)
        with system.open(path, "rb") as file:
            index = _scan(file, shard, state, caption)
    else:
        with open(shard, "rb") as file:
            index = _scan(file, shard, state, caption)
    for place in places:
        try:
            _save(index, place, caption)
            return _load(place, shard, state, caption) or index
        except (OSError, SafetensorError):  # a folder that takes no files
            continue
    return index


def _state(shard: str) -> tuple[int, int]:
    if not is_remote(shard):
        found = os.stat(shard)
        return found.st_size, found.st_mtime_ns
    system, path = open_remote(shard)
    info = system.info(path)
    # What tells a version differs between file systems: an ETag, a date, or nothing. Others, such as the last access, do not.
    known = sorted(
        (name, str(value)) for name, value in info.items() if _VERSIONS.fullmatch(re.sub(r"\W|_", "", name.lower()))
    )
    return int(info["size"] or 0), int(hashlib.sha256(json.dumps(known).encode()).hexdigest()[:15], 16)


def _load(place: Path, shard: str, state: tuple[int, int], caption: str) -> ShardIndex | None:
    if not place.is_file():
        return None
    try:
        with safe_open(place, framework="pt") as file:
            notes = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            if [notes.get(name) for name in ("version", "state", "caption")] != [_VERSION, list(state), caption]:
                return None
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            problems = tuple(map(tuple, notes["problems"]))
            index = ShardIndex(shard, state, columns, tuple(notes["classes"]), problems)
            return index if _is_sound(index) else None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError):
        return None  # a damaged index is made again


def _is_sound(index: ShardIndex) -> bool:
    """Whether the numbers of an index, which may come with shards of others, lie in the tar file and in its own columns."""
    columns, rows, size = index.columns, len(index), index.state[0]
    if any(columns[name].dtype != torch.int64 or columns[name].shape != (rows,) for name in _NUMBERS):
        return False
    for begins, sizes in (("offsets", "sizes"), ("json_offsets", "json_sizes")):
        if ((columns[begins] < 0) | (columns[sizes] < 0) | (columns[sizes] > size - columns[begins])).any():
            return False
    for name in ("names", "captions"):
        ends = columns[f"{name}_ends"]
        if (
            ends.shape != (rows,)
            or (ends.diff(prepend=ends.new_zeros(1)) < 0).any()
            or ends[-1:].sum() != len(columns[name])
        ):
            return False
    return bool(((columns["labels"] >= -1) & (columns["labels"] < len(index.classes))).all())


def _save(index: ShardIndex, place: Path, caption: str) -> None:
    notes = {"version": _VERSION, "state": index.state, "caption": caption}
    notes |= {"classes": index.classes, "problems": index.problems}
    with replacing(place) as part:
        save_file(index.columns, part, metadata={name: json.dumps(value) for name, value in notes.items()})


# ------------------------------------------------------------------------------------------------------------- headers


@dataclass
class _Sample:
    videos: list[tuple[str, str, int, int]] = field(default_factory=list)
    """(member, extension without its last part, offset, size)."""
    texts: dict[str, tuple[bytes, int, int]] = field(default_factory=dict)
    """(content, offset, size) by extension."""
    seen: set[str] = field(default_factory=set)
    """Extensions of its members."""

    def text(self, name: str, kind: str) -> tuple[bytes, int, int] | None:
        """Return the text for a video: KEY.left.txt for KEY.left.mp4, else KEY.txt."""
        return self.texts.get(f"{name}{kind}") or self.texts.get(kind)


def _scan(file: BinaryIO, shard: str, state: tuple[int, int], caption: str) -> ShardIndex:
    """Read all headers, and the text of each sample."""
    problems: list[tuple[str, str]] = []
    samples: list[tuple[str, _Sample]] = []
    newest: dict[str, _Sample] = {}
    last = ""
    for info in _members(file, state[0], problems):
        found = _NAME.fullmatch(info.name)
        if info.isdir() or not found:
            continue
        key, extension = found[1], found[2].lower()
        name, dot, kind = extension.rpartition(".")
        is_video = f".{kind}" in VIDEO_SUFFIXES
        if not (is_video or kind in _TEXTS):
            continue
        if not info.isreg() or info.issparse():
            problems.append(("members that are links or of another kind than files, and left out", info.name))
            continue
        again = key != last and key in newest and extension in newest[key].seen
        if again:
            problems.append(("keys that come again, each time a sample", info.name))
        if again or key not in newest:
            newest[key] = _Sample()
            samples.append((key, newest[key]))
        sample, last = newest[key], key
        sample.seen.add(extension)
        if is_video:
            sample.videos.append((info.name, name + dot, info.offset_data, info.size))
        elif info.size > _MAX_TEXT:
            problems.append((f"texts of more than {_MAX_TEXT >> 20} MiB, which are left out", info.name))
        elif extension in sample.texts:
            problems.append(("keys with two texts, of which the first is used", info.name))
        else:
            file.seek(info.offset_data)
            sample.texts[extension] = file.read(info.size), info.offset_data, info.size
    return _index(samples, shard, state, caption, problems)


def _members(file: BinaryIO, size: int, problems: list[tuple[str, str]]):
    """Yield the headers of whole members; bytes that are none are skipped and named."""
    kind = _COMPRESSED.get(file.read(2))
    if kind:
        problems.append((f"shards packed with {kind}, which cannot be read at any place: unpack them once", ""))
        return
    file.seek(0)
    end, last = 0, "its beginning"
    try:
        # ignore_zeros: goes on behind a damaged header, and in tar files that were joined.
        with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()
                if info.size < 0 or info.offset_data < end:
                    problems.append(("shards with a header that is damaged, what follows is lost", f"after {last}"))
                    return
                if info.offset > end and _damaged(file, end, info.offset):
                    text = f"bytes {end:,} to {info.offset:,}, after {last}"
                    problems.append(("places in shards that are damaged and left out", text))
                if info.isreg() and info.offset_data + info.size > size:
                    problems.append(("shards that are cut off", f"within {info.name}, which is left out"))
                    return
                yield info
                end, last = tar.offset, info.name
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as error:
        problems.append(("shards that are cut off or damaged", f"after {last} ({error})"))
        return
    marked = end + _BLOCK <= size and not _damaged(file, end, end + _BLOCK)
    if end == 0:
        problems.append(("shards without a member" if marked else "files that are no tar files", ""))
    elif not marked and end < size:
        problems.append(("shards that are cut off or damaged", f"after {last}"))
    elif not marked:
        problems.append(("shards without the mark of their end, which may be cut off", f"after {last}"))


def _damaged(file: BinaryIO, begin: int, end: int) -> bool:
    """Whether bytes between members are anything but zeros, or a header for all members."""
    file.seek(begin)
    if file.read(_BLOCK)[156:157] == tarfile.XGLTYPE:
        return False
    file.seek(begin)
    while begin < end and (data := file.read(min(2**20, end - begin))):
        if data.strip(b"\0"):
            return True
        begin += len(data)
    return False


def _index(samples: list[tuple[str, _Sample]], shard: str, state, caption: str, problems: list) -> ShardIndex:
    numbers: list[tuple[int, ...]] = []
    names: list[str] = []
    captions: list[str | None] = []
    classes: dict[str, int] = {}
    taken: dict[str, int] = {}
    for key, sample in samples:
        if not sample.videos:
            problems.append(("keys without a video", key))
            continue
        if len(sample.videos) > 1:
            text = f"{key} ({', '.join(name.rpartition('/')[2] for name, *_ in sample.videos)})"
            problems.append(("keys with several videos, each of which is used", text))
        group = int(hashlib.sha256(group_of(key).encode("utf-8", "surrogatepass")).hexdigest()[:8], 16)
        read: dict[str, tuple] = {}
        for name, extension, offset, size in sample.videos:
            taken[name] = taken.get(name, 0) + 1
            names.append(name if taken[name] == 1 else f"{name}#{taken[name]}")
            if extension not in read:
                found = {kind: sample.text(extension, kind) for kind in _TEXTS}
                label = _class(found["cls"], key, problems)
                number = -1 if label is None else classes.setdefault(label, len(classes))
                place = found["json"][1:] if found["json"] else (0, 0)
                read[extension] = _caption(found, key, caption, problems), number, place
            text, number, place = read[extension]
            captions.append(text)
            numbers.append((offset, size, number, group, *place))
    columns = dict(zip(_NUMBERS, torch.tensor(numbers, dtype=torch.int64).reshape(-1, 6).T.contiguous(), strict=True))
    for column, strings in (("names", names), ("captions", captions)):
        columns[column], columns[f"{column}_ends"] = pack_strings(strings)
    columns = {name: values.clone() for name, values in columns.items()}  # safetensors refuses shared memory
    return ShardIndex(shard, state, columns, tuple(classes), tuple(problems))


def _class(text: tuple[bytes, int, int] | None, key: str, problems: list) -> str | None:
    """Return the name of a class: what the file says, whole numbers in one spelling; None for numbers below 0."""
    label = _decoded(text, key, "classes", problems)
    if label is None or not re.fullmatch(r"[+-]?[0-9]{1,18}", label):
        return label
    return str(int(label)) if int(label) >= 0 else None


def _caption(texts: dict[str, tuple[bytes, int, int] | None], key: str, wanted: str, problems: list) -> str | None:
    """Return the field `wanted` of .json; with "" .txt, or the field "caption" where .txt is missing, empty or no UTF-8."""
    text, before = None if wanted else _decoded(texts["txt"], key, "captions", problems), len(problems)
    value = _field(texts["json"], wanted or "caption", key, problems)
    if wanted and value is None and len(problems) == before:
        problems.append((f"keys without a text in the field {wanted} of .json", key))
    if text is not None and value is not None and text not in captions_of(value):
        problems.append(("keys with one caption in .txt and another in .json, of which .txt is used", key))
    return value if text is None else text


def _field(text: tuple[bytes, int, int] | None, name: str, key: str, problems: list) -> str | None:
    if text is None:
        return None
    try:
        row = json.loads(text[0])
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        problems.append((".json that cannot be read", key))
        return None
    texts = value if isinstance(value := row.get(name), list) else [value]
    if not all(isinstance(text, str | None) for text in texts):
        problems.append((f"fields {name} of .json that are no text", key))
        return None
    return join_captions(texts)


def _decoded(text: tuple[bytes, int, int] | None, key: str, what: str, problems: list) -> str | None:
    try:
        return None if text is None else text[0].decode("utf-8-sig").strip() or None
    except UnicodeDecodeError:
        problems.append((f"{what} that are not UTF-8 and left out, their videos are used", key))
        return None
