"""Writes videos as phones, camcorders, recorders and editors do: hidden frames, odd clocks, orientations, shapes of pixels."""

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

_GOOD = {"qmin": "1", "qmax": "4"}


def numbered(count: int, height: int = 32, width: int = 32) -> np.ndarray:
    """Return uint8 (count, H, W, 3) grey frames of brightness 40 (the first) to 240, with a white corner at the top left."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[:] = np.linspace(40, 240, count).round()[:, None, None, None]
    frames[:, : height // 2, : width // 2] = 255
    return frames


def numbers(frames: np.ndarray, count: int) -> list[int]:
    """Return the numbers of decoded frames of `numbered(count)`, by the brightness of their bottom right."""
    height, width = frames.shape[1:3]
    brightness = frames[:, height * 5 // 8 :, width * 5 // 8 :].mean((1, 2, 3))
    return [int(number) for number in ((brightness - 40) / 200 * (count - 1)).round()]


def write(
    path: Path,
    frames: np.ndarray,
    fps: Fraction | int = 24,
    *,
    seconds: Callable[[int], float] | None = None,
    codec: str = "libx264",
    rotation: tuple[int, bool, bool] | None = None,
    pixel_shape: Fraction | None = None,
    **options: str,
) -> Path:
    """Encode uint8 (T, H, W, 3) frames. Frame k is shown at `seconds(k)`, while the header states `fps`."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=fps, options=_GOOD | {"g": "24", "bf": "2"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        if pixel_shape is not None:
            stream.codec_context.sample_aspect_ratio = pixel_shape
        if rotation is not None:
            stream.set_display_rotation(*rotation)
        if seconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for k, pixels in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if seconds is not None:
                picture.pts, picture.time_base = round(1000 * seconds(k)), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def copy(source: Path, path: Path, shift: Callable[[int], float] = lambda k: 0, first: int = 0, **options: str) -> Path:
    """Copy packets without decoding, from packet `first` on; the times of packet k move by `shift(k)` seconds.

    In an MP4, frames that are moved before zero are hidden by an edit list.
    """
    with av.open(str(source)) as before, av.open(str(path), "w", options=options) as after:
        stream = before.streams.video[0]
        target = after.add_stream_from_template(stream)
        packets = [packet for packet in before.demux(stream) if packet.size]
        for k, packet in enumerate(packets[first:]):
            ticks = round(shift(k) / stream.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts + ticks, packet.dts + ticks, target
            after.mux(packet)
    return path


def cut(source: Path, path: Path, share: float = 0.5) -> Path:
    """Write the first part of a file."""
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def state_frames(source: Path, path: Path, count: int) -> Path:
    """Copy an AVI with another number of frames in its headers."""
    data = bytearray(source.read_bytes())
    for name, offset in ((b"avih", 24), (b"strh", 40)):
        struct.pack_into("<I", data, data.find(name) + offset, count)
    path.write_bytes(data)
    return path
