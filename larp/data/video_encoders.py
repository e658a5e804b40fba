"""Encodes frames for `larp.data.video.VideoWriter`: by FFmpeg into a container, or by Pillow into a GIF."""

from __future__ import annotations

import platform
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from larp.data.open_video import DECODE_ERRORS, MAX_BYTES, VideoError, av

import numpy as np

if TYPE_CHECKING:
    from larp.data.audio import AudioTrack

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
        self, target: str, rate: Fraction, size: tuple[int, ...], encoding: Encoding, audio: AudioTrack | None
    ):
        self.padding = [(0, 0)] * 4
        height, width = size[:2]
        if "420" in encoding.pixel_format:
            self.padding = [(0, 0), (0, height % 2), (0, width % 2), (0, 0)]
        self.rate, self.audio, self.frames, self.sound = rate, audio, 0, None
        self.container = av.open(target, "w")
        try:
            options = _encoder_options(encoding)
            self.stream = self.container.add_stream(encoding.codec, rate=rate, options=options)
            self.stream.height, self.stream.width = height + self.padding[1][1], width + self.padding[2][1]
            self.stream.pix_fmt, self.stream.thread_count = encoding.pixel_format, 1
            if audio is not None:
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
            self._mux_sound(self.frames / self.rate)
            self.frames += 1
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            self.container.mux(self.stream.encode(picture))

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
        if self.sound is not None:
            for packet in self.audio.packets(until):
                packet.stream = self.sound
                self.container.mux(packet)


class Gif:
    """An animated GIF; Pillow writes all frames at once, so they are held in memory."""

    def __init__(self, target: str, rate: Fraction):
        self.target, self.pictures, self.bytes = target, [], 0
        # GIF delays are in hundredths of a second, and players slow down delays below two hundredths.
        self.duration = max(20, round(100 / float(rate)) * 10)

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
        first.save(self.target, save_all=True, append_images=others, duration=self.duration, loop=0, disposal=1)


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
