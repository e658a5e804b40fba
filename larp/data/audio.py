"""Copies the audio of one video file into another, packet by packet, without decoding it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from larp.data.open_video import DECODE_ERRORS, opened

if TYPE_CHECKING:
    import av


class AudioTrack:
    """The first audio stream of a video file; a context manager.

    Timestamps are relative to the first video frame.

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
        container, video = self._file.enter_context(opened(self.path))
        known = [stream for stream in container.streams.audio if stream.codec_context is not None]
        if known:
            self.stream, self.codec = known[0], known[0].codec_context.name
            self._packets = container.demux(self.stream)
            self._shift = round((video.start_time or 0) * video.time_base / self.stream.time_base)
        elif container.streams.audio:
            self.notes.append("the sound was left out: its codec is not known to this FFmpeg")
        return self

    def __exit__(self, *_) -> None:
        # The exception is not passed on: an error inside the block must not be reported as an error of this file.
        self._file.close()

    def packets(self, until: Fraction | None) -> Iterator[av.Packet]:
        """Yield the next packets in order: those that start before `until` seconds, or all remaining ones if None."""
        while self._next is not None or self._advance():
            if until is not None and self._next.dts * self.stream.time_base >= until:
                return
            packet, self._next = self._next, None
            yield packet

    def _advance(self) -> bool:
        """Fetch the next packet; return False at the end. A damaged packet ends the audio, not the video."""
        try:
            for packet in self._packets:
                if packet.dts is not None and packet.size:
                    packet.pts = packet.dts if packet.pts is None else packet.pts
                    packet.pts, packet.dts = packet.pts - self._shift, packet.dts - self._shift
                    self._next = packet
                    return True
        except DECODE_ERRORS as error:
            self.notes.append(f"the sound ends early: the file is damaged there ({error})")
            self._packets = iter(())
        return False
