"""Copies the audio of one video file into another, packet by packet, without decoding it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from itertools import chain, pairwise
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from larp.data.frame_times import first_tick, read_times
from larp.data.open_video import DECODE_ERRORS, opened

if TYPE_CHECKING:
    import av


_STEADY = ("aac", "mp3", "ac3", "eac3")
"""Codecs whose packets all hold equally many samples."""


class AudioTrack:
    """The audio stream of a video file that FFmpeg ranks best; a context manager.

    Timestamps are relative to the first video frame, and rise from packet to packet.

    Attributes:
        stream: PyAV's audio stream, valid inside the block; None if the file has no stream that FFmpeg can decode.
        codec: name of its codec.
        notes: one line for each part of the audio that is lost.

    Raises VideoError on entry if the file cannot be opened.
    """

    def __init__(self, path: str | Path):
        self.path = path
        self.notes: list[str] = []
        self.stream, self.codec = None, ""
        self._next: av.Packet | None = None
        self._file = ExitStack()

    def __enter__(self) -> AudioTrack:
        first = _first_frame_time(self.path)
        container, video = self._file.enter_context(opened(self.path))
        known = [stream for stream in container.streams.audio if stream.codec_context is not None]
        if known:
            best = container.streams.best("audio", video)
            self.stream = best if best in known else known[0]
            self.codec = self.stream.codec_context.name
            self._packets = self._rising(container)
            self._shift = round(first / self.stream.time_base)
        elif container.streams.audio:
            self.notes.append("the sound was left out: its codec is not known to this FFmpeg")
        return self

    def __exit__(self, *_) -> None:
        # The exception is not passed on: an error inside the block must not be reported as an error of this file.
        self._file.close()

    def packets(self, until: Fraction | None) -> Iterator[av.Packet]:
        """Yield the next packets in order: those that start before `until` seconds, or all remaining ones if None."""
        while (packet := self._next or next(self._packets, None)) is not None:
            self._next = packet
            if until is not None and packet.dts * self.stream.time_base >= until:
                return
            self._next = None
            yield packet

    def _rising(self, container) -> Iterator[av.Packet]:
        """Yield the packets with rising timestamps: a repeated one is moved on, and what goes back further is left out."""
        last, late = None, 0
        for packet, following in pairwise(chain(self._demuxed(container), (None,))):
            if last is None:
                self._settle(packet, following)
            else:
                step, limit = max(packet.duration or 0, 1), inf if following is None else following.dts
                if packet.dts < last - step:
                    late += 1
                    continue
                if packet.dts <= last or last < limit < packet.dts:  # it repeats a time, or runs ahead of the next one
                    _move(packet, last + step if last + step < limit else last + 1)
            last = packet.dts
            yield packet
        if late:
            self.notes.append(f"the sound has gaps: {late} of its packets were left out, because their times go back")

    def _settle(self, packet: av.Packet, following: av.Packet | None) -> None:
        """Move the first packet right before the second: fragmented MP4s stretch it where the picture begins before the sound."""
        if self.codec in _STEADY and following is not None and packet.duration > following.duration > 0:
            packet.duration = following.duration
            _move(packet, following.dts - following.duration)

    def _demuxed(self, container) -> Iterator[av.Packet]:
        """Yield the packets with timestamps relative to the first frame. A damaged packet ends the audio, not the video.

        Of those that an edit list hides only the last one at the beginning is yielded, which decoders need to start.
        """
        held, started = None, False
        try:
            for packet in container.demux(self.stream):
                if packet.dts is None or not packet.size:
                    continue
                packet.pts = packet.dts if packet.pts is None else packet.pts
                _move(packet, packet.dts - self._shift)
                if packet.is_discard:
                    held = None if started else packet
                    continue
                if held is not None:
                    yield held
                held, started = None, True
                yield packet
        except DECODE_ERRORS as error:
            self.notes.append(f"the sound ends early: the file is damaged there ({error})")


def _first_frame_time(path: str | Path) -> Fraction:
    """Return the time in seconds of the first frame that decodes, or its place at an even rate, see `FrameTimes.early`.

    The header of an AVI does not count delayed frames.
    """
    with opened(path) as (container, video):
        early = read_times(path, container, video).early
    with opened(path) as (container, video):
        begin = first_tick(path, container)
        frame = next((frame for frame in container.decode(video) if frame.pts is None or frame.pts >= begin), None)
        pts = video.start_time if frame is None or frame.pts is None else frame.pts
        return (pts or 0) * video.time_base + Fraction(early)


def _move(packet: av.Packet, dts: int) -> None:
    packet.pts, packet.dts = packet.pts + dts - packet.dts, dts
