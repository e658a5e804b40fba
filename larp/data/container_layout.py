"""What the layout of a file shows and FFmpeg does not tell: fragments of an MP4, and a file that is cut off.

Only sizes and kinds of parts are read, a few bytes at a time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from larp.data.open_video import open_bytes

# More parts than this are not followed; a whole video has a handful.
_MOST_PARTS = 1000


def has_fragments(path: str | Path) -> bool:
    """Whether an MP4 file holds fragments, of which its header may count none, or too many parts to tell."""
    with open_bytes(path) as file:
        return any(kind == b"moof" or number == _MOST_PARTS for number, kind in enumerate(_boxes(file)))


def ends_early(path: str | Path, container: str) -> bool:
    """Whether a file is shorter than the sizes in it say; `container` is FFmpeg's name of its demuxer.

    Known for AVI, FLV and Matroska; False for other containers, and for a recording that was never finished.
    """
    with open_bytes(path) as file:
        if container == "avi":
            return _riff_end(file) > _length(file)
        if container == "flv":
            return not _ends_with_tag(file)
        return container.startswith("matroska") and _segment_end(file) > _length(file)


def lacks_end(path: str | Path, container: str) -> bool:
    """Whether a file stops before its end, as its parts show; `container` is FFmpeg's name of its demuxer.

    Known for GIF, animated PNG, JPEG, Ogg, and Matroska of a known size; False for other containers. What follows data that
    is not of its kind is not looked at.
    """
    if container.startswith("matroska"):
        return ends_early(path, container)
    walk = _STOPS.get(container)
    if walk is None:
        return False
    with open_bytes(path) as file:
        return walk(file, _length(file))


def _gif_stops(file: BinaryIO, length: int) -> bool:
    """Whether a GIF stops before its trailer."""

    def colours(flags: int) -> int:
        return 6 << (flags & 7) if flags & 0x80 else 0

    place = 13 + colours(_at(file, 10, 1)[0]) if length > 10 else length
    while place < length:
        kind = _at(file, place, 10)
        if kind[0] not in (0x21, 0x2C):
            return False
        place += 2 if kind[0] == 0x21 else 11 + colours(kind[-1])
        file.seek(place)
        while size := file.read(1):
            place = file.seek(size[0], os.SEEK_CUR)
            if size == b"\0":
                break
        else:
            return True
    return True


def _png_stops(file: BinaryIO, length: int) -> bool:
    """Whether a PNG stops before its last chunk."""
    place = 8
    while place + 12 <= length:
        head = _at(file, place, 8)
        if head[4:] == b"IEND" or not head[4:].isalpha():
            return False
        place += 12 + int.from_bytes(head[:4], "big")
    return True


def _jpeg_stops(file: BinaryIO, length: int) -> bool:
    """Whether a JPEG picture stops before its end; another may follow."""
    place = 2
    while place < length:
        head = _at(file, place, 4)
        if head[0] != 0xFF or head[1:2] == b"\xd9":
            return False
        if head[1:2] == b"\xff":  # fills
            place += 1
            continue
        place += 2 + int.from_bytes(head[2:], "big")
        if head[1:2] == b"\xda":  # then coded pixels, up to the next marker that is none of theirs
            file.seek(place)
            marker = re.search(rb"\xff[^\x00\xd0-\xd7\xff]", file.read())
            place = length if marker is None else place + marker.start()
    return True


def _jpegs_stop(file: BinaryIO, length: int) -> bool:
    """Whether JPEG pictures in a row stop before the end of the last one."""
    return not _at(file, max(0, length - 256), 256).rstrip(b"\0").endswith(b"\xff\xd9")


def _ogg_stops(file: BinaryIO, length: int) -> bool:
    """Whether an Ogg file stops within a page, or before the last page of one of its streams."""
    place, begun = 0, set()
    while place < length:
        head = _at(file, place, 27)
        if head[:4] != b"OggS"[: len(head)]:
            return False
        if len(head) < 27:
            return True
        serial, sizes = head[14:18], file.read(head[26])
        begun = begun - {serial} if head[5] & 4 else begun | {serial}
        place += 27 + head[26] + sum(sizes)
    return place > length or bool(begun)


_STOPS = {
    "gif": _gif_stops, "apng": _png_stops, "jpeg_pipe": _jpeg_stops, "mjpeg": _jpegs_stop, "ogg": _ogg_stops
}  # fmt: skip


def _boxes(file: BinaryIO) -> Iterator[bytes]:
    """Yield the kind of each box at the top level of an MP4 file."""
    place, length = 0, _length(file)
    while place + 8 <= length:
        head = _at(file, place, 16)
        size = int.from_bytes(head[:4], "big")
        if size == 1:  # a size of 64 bits follows
            size = int.from_bytes(head[8:], "big")
        place = length if size == 0 else place + max(8, size)  # 0: to the end of the file
        yield head[4:8]


def _riff_end(file: BinaryIO) -> int:
    """Return where the last of the RIFF chunks, of which a long AVI has several, ends according to its size."""
    place, length = 0, _length(file)
    for _ in range(_MOST_PARTS):
        if place + 8 > length or _at(file, place, 4) != b"RIFF":
            break
        size = int.from_bytes(_at(file, place + 4, 4), "little")
        place += 8 + size + size % 2
    return place - 1  # the last byte only pads to an even size


def _ends_with_tag(file: BinaryIO) -> bool:
    """Whether an FLV file ends with a whole tag, which is followed by its own size."""
    length = _length(file)
    size = int.from_bytes(_at(file, length - 4, 4), "big") if length > 4 else 0
    tag = _at(file, length - 4 - size, 4) if 11 <= size <= length - 4 else bytes(4)
    return tag[0] & 0x1F in (8, 9, 18) and int.from_bytes(tag[1:], "big") == size - 11


def _segment_end(file: BinaryIO) -> int:
    """Return where the segment of a Matroska file ends; 0 if its size is unknown, as while recording."""
    head = _at(file, 0, 4096)
    header, place = _vint(head, 4)
    place += header
    if head[place : place + 4] != b"\x18\x53\x80\x67":
        return 0
    size, begin = _vint(head, place + 4)
    unknown = size == (1 << 7 * (begin - place - 4)) - 1
    return 0 if unknown else begin + size


def _vint(data: bytes, place: int) -> tuple[int, int]:
    """Return a number of variable length of Matroska, and where it ends."""
    first = data[place] if place < len(data) else 0
    width = 9 - first.bit_length()
    value = int.from_bytes(data[place : place + width], "big") & ((1 << 7 * width) - 1)
    return value, place + width


def _at(file: BinaryIO, place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)


def _length(file: BinaryIO) -> int:
    return file.seek(0, os.SEEK_END)
