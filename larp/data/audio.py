"""The sound of a video file, carried into another file packet by packet, never decoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from larp.data.container import DECODE_ERRORS, opened

if TYPE_CHECKING:
    import av


class AudioTrack:
    """The first audio stream of a video file, timed from the file's first video frame on; a context manager.

    stream: PyAV's audio stream inside the block, None if the file has none that this FFmpeg knows. codec: its name.
    notes: one line for everything of the sound that is lost on the way. Raises VideoError on entering.
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
        # Without the exception: what went wrong in the block is no fault of this file, and must not be named after it.
        self._file.close()

    def packets(self, until: Fraction | None) -> Iterator[av.Packet]:
        """Yield the next packets, in order: those that begin before `until` seconds, or (None) all that are left."""
        while self._next is not None or self._advance():
            if until is not None and self._next.dts * self.stream.time_base >= until:
                return
            packet, self._next = self._next, None
            yield packet

    def _advance(self) -> bool:
        """Fetch the next packet; False at the end. Damage ends the sound, not the video."""
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
