"""Lists the videos of WebDataset shards, tar files such as video2dataset writes: KEY.mp4, KEY.txt, KEY.json, KEY.cls.

The package webdataset is not used: it streams shards, which divides them among processes by whole shards, resumes at none of
their samples, and shuffles in a buffer. An index of the headers (larp/data/tar_index.py) makes shards a list of videos like
any other. What webdataset understands by a pattern and by a key is kept.
"""

from __future__ import annotations

import bisect
import glob
import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise

from larp.data.listing import (
    DataError,
    Split,
    StoredItems,
    VideoItem,
    VideoSet,
    hash_split_rows,
    ordered_classes,
    printable,
    spoken,
)
from larp.data.tar_index import ShardIndex, group_of, is_remote, open_index, open_remote
from larp.files import user_path

import torch
from tqdm import tqdm

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_IN_FOLDERS = re.compile(r"^[^.].*\.(tar(\.(gz|bz2|xz|zst))?|tgz)$", re.IGNORECASE)
_SHOWN = 20
"""Most names in a note."""
_READERS = 8  # threads that read headers, which wait for disks and networks


class Shards:
    """The samples of several tar files, in the order of the shards and of the keys in each.

    Raises DataError if none can be read.
    """

    def __init__(self, pattern: str, spec: str, caption: str = ""):
        names, missing = find_shards(pattern, spec)
        self.notes = _note("shards that are missing", missing, spec, len(names) + len(missing))
        self.indices: list[ShardIndex] = []
        problems: dict[str, list[str]] = {}
        with ThreadPoolExecutor(_READERS) as pool:
            opened = tqdm(
                pool.map(lambda name: _open_or_error(name, caption), names),
                total=len(names), desc="reading headers of shards", unit="shard", delay=2,
            )  # fmt: skip
            for name, index in zip(names, opened, strict=True):
                if isinstance(index, Exception):
                    problems.setdefault("shards that cannot be opened", []).append(f"{name} ({index})")
                    continue
                self.indices.append(index)
                for what, where in index.problems:
                    problems.setdefault(what, []).append(f"{os.path.basename(name)}: {where}".removesuffix(": "))
        for what, where in problems.items():
            self.notes += _note(what, where, spec)
        self._starts = list(accumulate(map(len, self.indices), initial=0))
        if not len(self):
            raise DataError(f"{spec}: 0 samples in {len(names)} shards{_why(problems)}")
        folders = [os.path.dirname(index.shard) for index in self.indices]
        # Not commonpath, which takes no mixture of URLs and paths.
        common = os.path.commonprefix([f"{folder}/" for folder in folders]).rpartition("/")[0]  # noqa: RUF071
        self._prefixes = [index.shard[len(common) :].lstrip("/") for index in self.indices]
        self.classes = ordered_classes(name for index in self.indices for name in index.classes)
        words = [name for name in self.classes if not name.isdecimal()]
        if len(words) < len(self.classes):
            self.notes += _note("classes that are no numbers, where others are", words, spec)
        number = {name: k for k, name in enumerate(self.classes)}
        self._labels = [[number[name] for name in index.classes] for index in self.indices]

    def __len__(self) -> int:
        """Number of videos."""
        return self._starts[-1]

    def place(self, row: int) -> tuple[int, int]:
        """Return the number of the shard of a row, and the row in it."""
        shard = bisect.bisect_right(self._starts, row) - 1
        return shard, row - self._starts[shard]

    def item(self, row: int) -> VideoItem:
        """Return a video; it is named SHARD/MEMBER."""
        shard, local = self.place(row)
        index = self.indices[shard]
        number = int(index.columns["labels"][local])
        label = None if number < 0 else self._labels[shard][number]
        caption = index.text("captions", local) or (None if label is None else spoken(self.classes[label]))
        name = index.text("names", local)
        key = re.sub(r"\.[^/]*$", "", name)
        group = group_of(key)
        group = None if group == key else group
        return VideoItem(index.member(local), f"{self._prefixes[shard]}/{name}", label, caption, group)

    def items(self, split: Split, spec: str) -> StoredItems:
        """Return the videos of a split, about one in ten for test; pieces that are cut from one video stay together."""
        hashes = torch.cat([index.columns["hashes"] for index in self.indices])
        rows = hash_split_rows(hashes, split, spec)
        states = [
            [prefix, *index.state, index.problems] for prefix, index in zip(self._prefixes, self.indices, strict=True)
        ]
        fingerprint = hashlib.sha256(repr([states, self.classes, split]).encode("utf-8", "surrogatepass")).hexdigest()
        return StoredItems(self.item, rows, fingerprint[:16], list(map(len, self.indices)))


def read_shards(pattern: str, split: Split, spec: str, *, caption: str) -> VideoSet:
    """List the videos of shards; notes name all that is missing, damaged or left out.

    caption: a field of .json; "": .txt, or the field "caption" where there is no .txt.
    """
    shards = Shards(pattern, spec, caption)
    return VideoSet(shards.items(split, spec), shards.classes, spec, shards.notes)


def find_shards(pattern: str, spec: str) -> tuple[list[str], list[str]]:
    """Return the shards of a pattern that are there, and those that are named but missing.

    {000..123} and {a,b} are braces as in a shell, * ? [] are wild cards, :: stands between patterns, and a folder stands for
    its .tar files. URLs are opened by fsspec. Raises DataError if there is no shard.
    """
    if not pattern:
        raise DataError(f"{spec}: the pattern is missing after the colon; for example wds:DIR/{{00000..00099}}.tar")
    found: list[str] = []
    missing: list[str] = []
    for part in pattern.split("::"):
        for name in expand_braces(part):
            (found if (matches := _matches(name, spec)) else missing).extend(matches or [name])
    if not found:
        named = f"{len(missing)} names" if len(missing) > 1 else repr(pattern)
        raise DataError(f"{spec}: no shard matches {named}: give the .tar files, as in wds:DIR/*.tar")
    return list(dict.fromkeys(found)), list(dict.fromkeys(missing))


def expand_braces(pattern: str) -> list[str]:
    """Return the names that a pattern with braces stands for: "{08..10}.tar" -> 08.tar, 09.tar, 10.tar."""
    begin = pattern.find("{")
    depth, commas = 0, [begin]
    for place in range(max(begin, 0), len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[place], 0)
        if pattern[place] == "," and depth == 1:
            commas.append(place)
        if depth == 0:
            break
    if begin < 0 or depth:
        return [pattern]
    inner = pattern[begin + 1 : place]
    if numbers := _RANGE.fullmatch(inner):
        first, last = map(int, numbers.groups())
        step = 1 if last >= first else -1
        width = max(map(len, numbers.groups())) if any(re.match(r"-?0\d", text) for text in numbers.groups()) else 0
        choices = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    elif len(commas) > 1:
        parts = [pattern[left + 1 : right] for left, right in pairwise([*commas, place])]
        choices = [name for part in parts for name in expand_braces(part)]
    else:  # no braces in the sense of a shell
        choices = [f"{{{name}}}" for name in expand_braces(inner)]
    return [f"{pattern[:begin]}{choice}{rest}" for choice in choices for rest in expand_braces(pattern[place + 1 :])]


def _matches(name: str, spec: str) -> Sequence[str]:
    try:
        if is_remote(name):
            system, path = open_remote(name)
            if glob.has_magic(path):
                return [system.unstrip_protocol(match) for match in sorted(system.glob(path))]
            return [system.unstrip_protocol(path)] if system.exists(path) else []
    except Exception as error:  # each file system raises its own
        raise DataError(f"{spec}: {name} cannot be listed ({error}): check its name and your access") from error
    path = user_path(name)
    if path.is_dir():
        # Packed ones as well, which are then named and not passed over.
        return sorted(str(file) for file in path.iterdir() if _IN_FOLDERS.search(file.name) and file.is_file())
    if path.is_file():
        return [str(path)]
    return sorted(match for match in glob.glob(str(path)) if os.path.isfile(match)) if glob.has_magic(str(path)) else []


def _open_or_error(name: str, caption: str) -> ShardIndex | Exception:
    try:
        return open_index(name, caption)
    except Exception as error:  # each file system raises its own
        return error


def _note(what: str, names: list[str], spec: str, among: int | None = None) -> tuple[str, ...]:
    if not names:
        return ()
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    count = f"{len(names)} of {among}" if among else len(names)
    shown = "; ".join(map(printable, names[:_SHOWN]))
    return (f"{spec}: {what}: {count} ({shown}{more})" if any(names) else f"{spec}: {what}: {count}",)


def _why(problems: dict[str, list[str]]) -> str:
    if not problems:
        return ": their members are named neither KEY.mp4 nor by another suffix of videos"
    what, names = next(iter(problems.items()))
    return f": {what}: {len(names)} ({names[0]})"
