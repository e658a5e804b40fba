"""Encodes frames for `larp.data.video.VideoWriter`: by FFmpeg into a container, or by Pillow into a GIF."""

from __future__ import annotations

import io
import math
import platform
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING

from larp.data.open_video import DECODE_ERRORS, MAX_BYTES, VideoError, av

import numpy as np

if TYPE_CHECKING:
    from larp.data.audio import AudioTrack

_TICK = Fraction(1, 90_000)
"""Unit of uneven times, in seconds: that of transport streams."""
_SD_HEIGHT = 576
"""Most lines of standard definition, in pixels; players take an untagged video of more lines for BT.709."""
_SOUND = {
    "flv": ("aac", "mp3", "ac3", "eac3", "opus", "libopus", "flac"),
    "mpegts": ("aac", "mp2", "mp3", "ac3", "eac3", "opus", "libopus", "dca", "truehd"),
}
"""Decoders of sound that may be copied, by container: FFmpeg 8 ends the process over others in an FLV, and a transport stream
holds them as bytes that no player takes for sound."""
_ENCODER_CHOICES = ("libx264", "libopenh264", "mpeg4", "libx265", "libvpx-vp9", "mjpeg")


@dataclass(frozen=True)
class Encoding:
    """Encoder options of `VideoWriter`; quality is from 0 (best) to 51."""

    codec: str
    quality: int
    pixel_format: str
    preset: str
    tune: str | None


class Movie:
    """A container with one video stream and, optionally, an audio track whose packets are interleaved by time."""

    def __init__(
        self,
        target: str,
        rate: Fraction,
        size: tuple[int, ...],
        encoding: Encoding,
        audio: AudioTrack | None,
        seconds: Sequence[float] | None,
    ):
        self.padding = [(0, 0)] * 4
        height, width = size[:2]
        if "420" in encoding.pixel_format:
            self.padding = [(0, 0), (0, height % 2), (0, width % 2), (0, 0)]
        self.rate, self.audio, self.frames, self.sound, self._last_tick = rate, audio, 0, None, -math.inf
        self._seconds, self._last_pts = seconds, -(2**31)
        self._heard: Fraction | None = None  # seconds of sound that an AVI holds
        self._lead = Fraction(0)  # seconds of sound before the first frame, in an AVI
        self.container, self._reformatter = av.open(target, "w"), av.video.reformatter.VideoReformatter()
        try:
            options = _encoder_options(encoding)
            if audio is not None and self.container.format.name == "avi":
                options["bf"] = "0"  # an AVI plays frames later by those that the encoder holds back, but not the sound
            self.stream = self.container.add_stream(encoding.codec, rate=rate, options=options)
            self.stream.height, self.stream.width = height + self.padding[1][1], width + self.padding[2][1]
            self.stream.pix_fmt, self.stream.thread_count = encoding.pixel_format, 1
            self._tag_colours()
            if seconds is not None:
                self.stream.codec_context.time_base = _TICK
            if audio is not None:
                if not audio.codec.startswith(_SOUND.get(self.container.format.name, "")):
                    raise ValueError
                self.sound = self.container.add_stream_from_template(audio.stream)
            self.container.start_encoding()
        except BaseException:
            self.close()
            raise

    def add(self, frames: np.ndarray) -> None:
        """Encode uint8 (T, H, W, 3) frames."""
        if any(sum(pair) for pair in self.padding):
            frames = np.pad(frames, self.padding, mode="edge")
        for frame in frames:
            time = self._time(self.frames)
            self._mux_sound(time)
            self.frames += 1
            picture = self._convert(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"))
            if self._seconds is not None:
                # Muxers, whose ticks may be coarser, refuse a repeated one.
                step = math.ceil(self.stream.time_base / _TICK)
                self._last_pts = max(round(time / _TICK), self._last_pts + step)
                picture.pts, picture.time_base = self._last_pts, _TICK
            elif self._lead:  # rounded down, since FFmpeg shows H.264 in an AVI a frame late
                picture.pts, picture.time_base = self.frames - 1 + int(self._lead * self.rate), 1 / self.rate
            self.container.mux(self.stream.encode(picture))

    def _time(self, frame: int) -> Fraction:
        """Return the time in seconds of a frame."""
        if self._seconds is None:
            return frame / self.rate
        last = len(self._seconds) - 1
        return Fraction(self._seconds[min(frame, last)]) + max(0, frame - last) / self.rate

    def _tag_colours(self) -> None:
        """Choose BT.709 for HD and BT.601 for SD, and state it in the stream; RGB and JPEG formats have their own rules."""
        self._colours = None
        if self.stream.pix_fmt.startswith("yuv") and not self.stream.pix_fmt.startswith("yuvj"):
            high = self.stream.height > _SD_HEIGHT
            self._colours = av.video.reformatter.Colorspace.ITU709 if high else av.video.reformatter.Colorspace.ITU601
            tag = 1 if high else 6  # ITU-T H.273: BT.709, and SMPTE 170M, which is BT.601 with 525 lines
            codec = self.stream.codec_context
            codec.colorspace = codec.color_primaries = codec.color_trc = tag
            codec.color_range = av.video.reformatter.ColorRange.MPEG.value

    def _convert(self, picture: av.VideoFrame) -> av.VideoFrame:
        if self._colours is None:
            return picture  # the encoder converts it
        limited, form = av.video.reformatter.ColorRange.MPEG, self.stream.pix_fmt
        return self._reformatter.reformat(
            picture, format=form, dst_colorspace=self._colours, dst_color_range=limited, threads=1
        )

    def finish(self) -> None:
        """Flush the encoder and close the file."""
        self._mux_sound(None)
        self.container.mux(self.stream.encode())
        self.container.close()

    def close(self) -> None:
        """Close the file, complete or not."""
        with suppress(*DECODE_ERRORS):
            self.container.close()

    def _mux_sound(self, until: Fraction | None) -> None:
        """Copy the packets before `until` seconds. What the container refuses of the sound ends the sound, not the video."""
        if self.sound is None:
            return
        for packet in self.audio.packets(until):
            packet.stream = self.sound
            if self.container.format.name == "avi":
                self._begin_at_zero(packet)
            # Ticks may be coarser here, and muxers refuse a repeated one.
            tick = round(packet.dts * packet.time_base / self.sound.time_base)
            if tick <= self._last_tick:
                tick = self._last_tick + 1
                packet.time_base, packet.pts, packet.dts = self.sound.time_base, tick, tick
            self._last_tick = tick
            if self.container.format.name == "avi" and self._is_apart(packet):
                self.sound = None
                return
            try:
                self.container.mux(packet)
            except DECODE_ERRORS as error:
                if isinstance(error, OSError):  # a full disk
                    raise
                self.audio.notes.append(f"the sound ends early: the container refuses its {self.audio.codec} ({error})")
                self.sound = None
                return

    def _begin_at_zero(self, packet: av.Packet) -> None:
        """Move a packet so that the sound begins with the file, as it does in an AVI, and note by how much the frames move."""
        if self._heard is None:
            self._lead = max(Fraction(0), -packet.dts * packet.time_base)
        ticks = round(self._lead / packet.time_base)
        packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks

    def _is_apart(self, packet: av.Packet) -> bool:
        """Whether an AVI would play a packet more than a frame away from its time, because it plays sound without a pause."""
        time = packet.dts * packet.time_base
        self._heard = min(time, 0) if self._heard is None else self._heard
        apart = packet.duration and abs(time - self._heard) > 1 / self.rate
        if apart:
            how = "ends early" if self._heard > 0 else "was left out"
            self.audio.notes.append(f"the sound {how}: an .avi cannot hold a pause of it, .mkv can")
        self._heard += (packet.duration or 0) * packet.time_base
        return bool(apart)


class Gif:
    """An animated GIF; Pillow writes all frames at once, so they are held in memory.

    Pillow joins equal frames into one that is shown longer. They are taken apart again, so that every frame is kept.
    """

    def __init__(self, target: str, rate: Fraction, seconds: Sequence[float] | None):
        self.target, self.pictures, self.bytes = target, [], 0
        # GIF delays are in hundredths of a second, and players slow down delays below two hundredths.
        self.delay = max(2, round(100 / float(rate)))
        self.uneven = (
            [] if seconds is None else np.diff(np.round(np.asarray(seconds) * 100)).clip(2, 65535).astype(int).tolist()
        )

    def add(self, frames: np.ndarray) -> None:
        """Append uint8 (T, H, W, 3) frames."""
        from PIL import Image

        self.pictures += [Image.fromarray(frame) for frame in frames]
        self.bytes += frames.nbytes
        if self.bytes > MAX_BYTES:
            raise VideoError(f"a .gif of more than {MAX_BYTES >> 30} GiB of frames is not written: choose an .mp4")

    def finish(self) -> None:
        """Write the file."""
        first, *others = self.pictures
        # Each frame lasts one hundredth, so that the delay of a joined one is the number of its frames.
        joined = io.BytesIO()
        first.save(joined, "GIF", save_all=True, append_images=others, duration=10, loop=0, disposal=1)
        with open(self.target, "wb") as file:
            file.writelines(_apart(joined.getvalue(), chain(self.uneven, repeat(self.delay))))


# A transparent image of one pixel, which changes nothing: control extension up to the delay, the rest of it, and the image.
_STILL = b"\x21\xf9\x04\x05", b"\0\0" + b"\x2c\0\0\0\0\x01\0\x01\0\x80" + bytes(6) + b"\x02\x02\x44\x01\0"


def _apart(gif: bytes, delays: Iterator[int]) -> Iterator[bytes]:
    """Yield the pieces of a GIF in which a frame of delay n becomes n frames, each with the next one of `delays`."""

    def after_colours(at: int, flags: int) -> int:
        return at + (6 << (flags & 7) if flags & 0x80 else 0)

    def delay() -> bytes:
        return next(delays).to_bytes(2, "little")

    at, frames = after_colours(13, gif[10]), 1
    yield gif[:at]
    while gif[at] != 0x3B:
        start, image = at, gif[at] == 0x2C
        if gif[at : at + 2] == b"\x21\xf9":
            frames = int.from_bytes(gif[at + 4 : at + 6], "little")
            yield gif[at : at + 4] + delay()
            start, at = at + 6, at + 2
        else:
            at = after_colours(at + 10, gif[at + 9]) + 1 if image else at + 2
        while gif[at]:
            at += gif[at] + 1
        at += 1
        yield gif[start:at]
        if image:
            yield from (_STILL[0] + delay() + _STILL[1] for _ in range(frames - 1))
    yield gif[at:]


def check_encoder(path: Path, codec: str) -> None:
    """Raise VideoError that lists the available encoders unless `codec` is one of them."""
    try:
        av.codec.Codec(codec, "w")
    except ValueError:
        raise VideoError(_missing_encoder(path, codec)) from None


# With AVX-512, x264 encoded the same frames differently in one file of 150 (LOG.md, 2026-11-26).
_REPEATABLE = {"x264-params": "asm=avx2"} if platform.machine() in ("x86_64", "AMD64") else {}


def _encoder_options(encoding: Encoding) -> dict[str, str]:
    codec, quality = encoding.codec, encoding.quality
    if codec in ("libx264", "libx265"):
        return {
            "crf": str(quality),
            "preset": encoding.preset,
            **({"tune": encoding.tune} if encoding.tune else {}),
            **(_REPEATABLE if codec == "libx264" else {}),
            **({"x265-params": "log-level=none"} if codec == "libx265" else {}),
        }
    if codec.startswith("libvpx"):
        return {"crf": str(quality), "b": "0"}
    quantiser = str(max(2, round(quality * 31 / 51)))  # older codecs take a quantiser from 2 to 31
    return {"qmin": quantiser, "qmax": quantiser}


def _missing_encoder(path: Path, codec: str) -> str:
    present = []
    for name in _ENCODER_CHOICES:
        with suppress(ValueError):
            present.append(av.codec.Codec(name, "w").name)
    return (
        f"{path}: this FFmpeg has no encoder {codec!r}. Choose codec= one of "
        f"{', '.join(present) or 'none found'}, write a .gif (needs no encoder), "
        "or install the `av` wheel from PyPI, which brings libx264"
    )
