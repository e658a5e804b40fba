"""How many frames of a video file are shown, when, and at which rate, found from its packets without decoding.

Headers state what they like: frames that an edit list hides, the clock of the container for a rate, 1 for a recording that was
never finished. Packets do not.
"""

from __future__ import annotations

import math
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
# The most by which a first frame is shown longer because the sound begins before it, in seconds: encoders of sound start early.
_EARLY_SOUND = 0.1
_MILLISECOND = Fraction(1, 1000)
_STANDARD = (
    *(Fraction(rate * 1000, 1001) for rate in (24, 30, 48, 60, 120)),
    *map(Fraction, (24, 25, 30, 48, 50, 60, 120)),
)


@dataclass(frozen=True)
class FrameTimes:
    """The frames of a video that are shown: their number, the frames per second, and their times where these are uneven."""

    count: int
    fps: float
    """The average where the times are uneven."""
    seconds: np.ndarray | None = None
    """float64 (count,), ascending from 0; None where frame k is shown at k / fps."""
    early: float = 0.0
    """By how many seconds the file shows the first frame before its place at the even rate."""

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
    sound = bool(container.streams.audio)
    return (_indexed(stream, sound) if indexed else None) or _demuxed(path, container, stream, sound)


def first_tick(path: str | Path, container) -> float:
    """Return the time before which frames are not shown, in ticks: FFmpeg shows those that an edit list hides in fragments."""
    return 0 if container.format.name.startswith("mov") and has_fragments(path) else -math.inf


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


def _indexed(stream, sound: bool) -> FrameTimes | None:
    """Return the times by the index of an MP4 file, which lists every frame; None where the packets must tell.

    The index holds decoding times, which are even if and only if the times of showing are.
    """
    shown = [entry for entry in stream.index_entries if not entry.is_discard and entry.size > 0]
    ticks = np.array([entry.timestamp for entry in shown], np.int64)
    if len(ticks) < 2:
        return FrameTimes(len(ticks), _stated(stream)) if len(ticks) else None
    ticks, early = _settled(ticks, stream, sound)
    gap = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
    rounded = max(2, 2 * _MILLISECOND / stream.time_base)
    if (
        gap <= 0 or not _even(ticks, gap) or 0 < _spread(ticks, gap) <= rounded
    ):  # of these the times of showing tell more
        return None
    # FFmpeg's rate is measured in the index too, over all frames, and depends on how long the last one stays.
    hidden = len(shown) < len(stream.index_entries)
    slack = gap / 4 if not hidden else min(2, gap / 2)
    return FrameTimes(len(ticks), _rate(ticks, gap, stream, slack), early=early)


def _demuxed(path, container, stream, sound: bool) -> FrameTimes:
    begin = first_tick(path, container)
    packets = [
        (packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe)
        for packet in whole_packets(container, stream)
        if packet.size and not packet.is_discard and (packet.pts is None or packet.pts >= begin)
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
    (ticks, early), last = _settled(ticks[order], stream, sound), lasting[order[-1]]
    ticks = ticks - ticks[0]
    gap = ticks[-1] / (len(ticks) - 1)
    if gap <= 0:
        return FrameTimes(len(ticks), _stated(stream))
    if _even(ticks, gap):  # whatever the last frame's own duration: a pause, or what the header states for all
        return FrameTimes(len(ticks), _rate(ticks, gap, stream, min(2, gap / 2)), early=early)
    length = Fraction(int(ticks[-1]) + (last if last > 0 else round(gap)))
    average = len(ticks) / (length * stream.time_base)
    return FrameTimes(len(ticks), float(average), _apart(ticks, length) * float(stream.time_base), early)


def _settled(ticks: np.ndarray, stream, sound: bool) -> tuple[np.ndarray, float]:
    """Return ascending times with the first frame right before the others, and by how many seconds it was shown earlier.

    Where the sound begins first, as all AAC does, fragmented MP4s show the first frame from then on. Others stay as they are.
    """
    if not sound or len(ticks) < 4:
        return ticks, 0.0
    gap = (ticks[-1] - ticks[1]) / (len(ticks) - 2)
    early = round(ticks[1] - ticks[0] - gap)
    even = gap > 0 and _spread(ticks[1:], gap) <= min(early, gap) / 2
    if not even or not 2 < early <= _EARLY_SOUND / stream.time_base:
        return ticks, 0.0
    return np.concatenate([ticks[:1] + early, ticks[1:]]), float(early * stream.time_base)


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


def _spread(ticks: np.ndarray, gap: float) -> float:
    """Return by how many ticks times differ from an even rate: 1 or less if they were only rounded to ticks."""
    return float(np.ptp(ticks - gap * np.arange(len(ticks))))


def _rate(ticks: np.ndarray, gap: float, stream, slack: float) -> float:
    """Return the rate of frames at even times, `gap` ticks apart on average.

    Ticks may be as long as a millisecond, and times are copied between containers. Of the rates whose times, rounded to ticks
    or to milliseconds, are these, a usual one that the header states is meant, else one that fits exactly, else a usual one,
    else what the header states. Times that are uneven by more have the rate of the header if that agrees within `slack` ticks
    in all, or such a usual one within two, or a standard one that fits them no worse than their average.
    """
    stated = [rate for rate in (stream.average_rate, stream.base_rate) if rate]
    measured = 1 / (gap * float(stream.time_base))

    def period(rate: Fraction) -> float:
        return float(1 / (rate * stream.time_base))

    def error(rate: Fraction) -> float:
        return abs(period(rate) - gap) * len(ticks)

    def spread(rate: Fraction) -> float:
        return _spread(ticks, period(rate))

    meant = [rate for rate in (stream.average_rate,) if rate and rate.denominator in (1, 1001)]
    if _spread(ticks, gap) == 0:
        meant.append(1 / (int(gap) * stream.time_base))
    standard = sorted(_STANDARD, key=spread)
    usual = [rate for rate in (Fraction(round(measured)), Fraction(round(measured * 1.001) * 1000, 1001)) if rate]
    usual = [*standard, *sorted(usual, key=spread)]
    for most in (1, 2, 1 + _MILLISECOND / stream.time_base):  # rounded to ticks once, or twice, or after milliseconds
        for rate in (*meant, *usual, *stated):
            if spread(rate) <= min(1.01 * most, gap / 2):
                return float(rate)
    if stated and error(stated[0]) <= slack:
        return float(stated[0])
    near = [rate for rate in sorted((*stated, *usual), key=error) if error(rate) <= min(2, gap / 2)]
    if not near and spread(standard[0]) <= _spread(
        ticks, gap
    ):  # such as films in a broadcast, in turn two and three fields long
        near = standard
    return float(near[0] if near else measured)


def _stated(stream) -> float:
    return float(stream.average_rate or stream.base_rate or FRAMES_PER_SECOND)
