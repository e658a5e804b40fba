"""How many frames of a video file are shown, when, and at which rate, found from its packets without decoding.

Headers state what they like: frames that an edit list hides, the clock of the container for a rate, 1 for a recording that was
never finished. Packets do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from larp.data.container_layout import ends_early, has_fragments
from larp.data.open_video import FRAMES_PER_SECOND

import numpy as np

# Streams of broadcasts and discs, whose clock may jump, and which may begin between two key frames.
_BROADCAST = ("mpegts", "mpeg")
# A longer pause in a broadcast, in seconds, is a jump of its clock; FFmpeg's limit.
_JUMP = 10


@dataclass(frozen=True)
class FrameTimes:
    """The frames of a video that are shown: their number, the frames per second, and their times where these are uneven."""

    count: int
    fps: float
    """The average where the times are uneven."""
    seconds: np.ndarray | None = None
    """float64 (count,), ascending from 0; None where frame k is shown at k / fps."""

    def at(self, seconds: float) -> int:
        """Return the frame nearest to a time after the first frame; `count` or more beyond the end."""
        even = round(seconds * self.fps)
        if self.seconds is None or seconds * self.fps >= self.count:
            return even
        return int(np.abs(self.seconds - seconds).argmin())

    def window(self, start: int, span: int) -> int:
        """Return the first frame of a window of `span` frames that, by time, lies where `start` frames precede it on average.

        That is `start` itself where times are even. Otherwise the middle of the window goes by its time.
        """
        if self.seconds is None:
            return start
        middle = self.at((start + span / 2) / self.fps)
        return max(0, min(middle - span // 2, self.count - span))

    def first(self, count: int) -> FrameTimes:
        """Return the times of the first `count` frames; even ones if times are not known for as many."""
        known = self.seconds is not None and count <= self.count
        return replace(self, count=count, seconds=self.seconds[:count] if known else None)

    def rate(self, start: int, span: int) -> float:
        """Return the frames per second of the `span` frames from `start` on."""
        if self.seconds is None or span < 2:
            return self.fps
        length = self.seconds[min(start + span, self.count) - 1] - self.seconds[start]
        return float((span - 1) / length) if length > 0 else self.fps


def read_times(path: str | Path, container, stream) -> FrameTimes:
    """Return the frame times of an opened file, whose packets may be used up by it. FFmpeg's errors pass."""
    kind = container.format.name
    indexed = kind.startswith("mov") and not has_fragments(path)
    return (_indexed(stream) if indexed else None) or _demuxed(container, stream)


def promised_frames(path: str | Path, container, stream) -> int:
    """Return how many frames a just opened file should show, 0 if it does not tell or tells what is known to be wrong.

    Frames that an edit list hides do not count. A wrong number of an AVI counts only if the file is also cut off. An MP4 of
    fragments, which recorders write since it may end anywhere, promises no more than its header.
    """
    kind = container.format.name
    if kind.startswith("mov") and not has_fragments(path):
        return sum(not entry.is_discard and entry.size > 0 for entry in stream.index_entries)
    if kind == "avi":
        return stream.frames if ends_early(path, kind) else 0
    if (kind == "flv" or kind.startswith("matroska")) and ends_early(path, kind):
        return round((container.duration or 0) / 1_000_000 * _stated(stream))
    return stream.frames


def whole_packets(container, stream) -> Iterator:
    """Yield the packets of a stream and the empty one that ends it, without incomplete packets just before the end.

    Where a recording broke off, its last packet is incomplete. Of a picture only the first is yielded: a second one in its
    file is a gain map or another view. An empty packet before the end, with which Theora repeats a frame, is no frame:
    FFmpeg's decoders refuse it, and the frame before stays longer.
    """
    held, end = [], None
    packets = container.demux(stream)
    if container.format.name.endswith("_pipe"):
        packets = (packet for number, packet in enumerate(packets) if number == 0 or not packet.size)
    for packet in packets:
        if not packet.size:
            end = packet
        elif packet.is_corrupt:
            held.append(packet)
        else:
            yield from held
            held = []
            yield packet
    if end is not None:
        yield end


def _indexed(stream) -> FrameTimes | None:
    """Return the times by the index of an MP4 file, which lists every frame; None where the packets must tell.

    The index holds decoding times, which are even if and only if the times of showing are.
    """
    shown = [entry for entry in stream.index_entries if not entry.is_discard and entry.size > 0]
    ticks = np.array([entry.timestamp for entry in shown], np.int64)
    if len(ticks) < 2:
        return FrameTimes(len(ticks), _stated(stream)) if len(ticks) else None
    gap = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
    if gap <= 0 or not _even(ticks, gap):
        return None
    # FFmpeg's rate is measured in the index too, over all frames, and depends on how long the last one stays.
    hidden = len(shown) < len(stream.index_entries)
    slack = gap if not hidden else min(2, gap / 2)
    return FrameTimes(len(ticks), _rate(len(ticks), gap * len(ticks), stream, slack))


def _demuxed(container, stream) -> FrameTimes:
    packets = [
        (packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe)
        for packet in whole_packets(container, stream)
        if packet.size and not packet.is_discard
    ]
    broadcast = container.format.name in _BROADCAST
    if broadcast:  # what precedes the first key frame cannot be decoded
        packets = packets[next((k for k, packet in enumerate(packets) if packet[3]), 0) :]
    shown, decoded, lasting, _ = zip(*packets, strict=True) if packets else ((), (), (), ())
    known = shown if None not in shown else decoded
    if len(packets) < 2 or None in known:
        return FrameTimes(len(packets), _stated(stream))
    ticks = np.array(known, np.int64)
    if broadcast and None not in decoded:
        ticks += _jumps(np.array(decoded, np.int64), int(_JUMP / stream.time_base))
    order = np.argsort(ticks, kind="stable")
    ticks, last = ticks[order] - ticks.min(), lasting[order[-1]]
    gap = ticks[-1] / (len(ticks) - 1)
    if gap <= 0:
        return FrameTimes(len(ticks), _stated(stream))
    if _even(ticks, gap):  # whatever the last frame's own duration: a pause, or what the header states for all
        return FrameTimes(len(ticks), _rate(len(ticks), gap * len(ticks), stream, min(2, gap / 2)))
    length = Fraction(int(ticks[-1]) + (last if last > 0 else round(gap)))
    average = len(ticks) / (length * stream.time_base)
    return FrameTimes(len(ticks), float(average), _apart(ticks, length) * float(stream.time_base))


def _apart(ticks: np.ndarray, end: float) -> np.ndarray:
    """Return float64 (n,): ascending times, where frames of one time share that until the next, or until `end`."""
    times, first, counts = np.unique(ticks, return_index=True, return_counts=True)
    gaps = np.diff(times, append=float(end))
    place = np.arange(len(ticks)) - np.repeat(first, counts)
    return np.repeat(times, counts) + place * np.repeat(gaps / counts, counts)


def _jumps(decoded: np.ndarray, limit: int) -> np.ndarray:
    """Return int64 (n,): what to add to times so that a clock that jumps by over `limit` ticks, or back, goes on instead."""
    gaps = np.diff(decoded)
    jumped = (gaps < 0) | (gaps > limit)
    usual = int(np.median(gaps[~jumped])) if not jumped.all() else 0
    return np.concatenate([[0], np.cumsum(np.where(jumped, usual - gaps, 0))])


def _even(ticks: np.ndarray, gap: float) -> bool:
    """Whether each frame is shown within half a frame of its place at an even rate."""
    return bool(np.abs(ticks - ticks[0] - gap * np.arange(len(ticks))).max() <= gap / 2)


def _rate(count: int, total: float, stream, slack: float) -> float:
    """Return the rate of `count` frames that take `total` ticks in all, as the header states it if within `slack` ticks.

    Ticks are as long as a millisecond, so that otherwise the nearest usual rate within `slack` is meant.
    """
    tick = float(stream.time_base)

    def error(rate: Fraction) -> float:
        return abs(count / float(rate) / tick - total)

    measured = count / (total * tick)
    stated = [rate for rate in (stream.average_rate, stream.base_rate) if rate]
    usual = [Fraction(round(measured)), Fraction(round(measured * 1.001) * 1000, 1001)]
    for rate in (*stated[:1], *sorted((rate for rate in (*stated, *usual) if rate), key=error)):
        if error(rate) <= slack:
            return float(rate)
    return measured


def _stated(stream) -> float:
    return float(stream.average_rate or stream.base_rate or FRAMES_PER_SECOND)
