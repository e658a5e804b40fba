"""Writes small test videos with audio and with variable frame rates."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RATE = 16_000


def write_with_sound(path: Path, frames: np.ndarray, fps: int, codec: str = "aac", delay: float = 0.0) -> Path:
    """Write uint8 (T, H, W, 3) frames and a tone of about the same length; the frames start after `delay` seconds."""
    seconds = len(frames) / fps + delay
    tone = np.sin(2 * np.pi * 440 * np.arange(int(seconds * RATE)) / RATE)[None]
    tone = np.ascontiguousarray(tone / 2, np.float32) if codec == "aac" else (tone * 2**14).astype(np.int16)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=fps)
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        sound = container.add_stream(codec, rate=RATE)
        sound.layout = "mono"
        for start in range(0, tone.shape[1] - 1024, 1024):
            piece = np.ascontiguousarray(tone[:, start : start + 1024])
            frame = av.AudioFrame.from_ndarray(piece, format="fltp" if codec == "aac" else "s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, start, Fraction(1, RATE)
            container.mux(sound.encode(frame))
        for k, pixels in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            picture.pts, picture.time_base = k + round(delay * fps), Fraction(1, fps)
            container.mux(video.encode(picture))
        container.mux(video.encode())
        container.mux(sound.encode())
    return path


def sound_of(path: Path) -> np.ndarray:
    """The audio samples of a file, float (n,); empty without audio."""
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return np.zeros(0)
        pieces = [frame.to_ndarray().reshape(-1).astype(float) for frame in container.decode(audio=0)]
    return np.concatenate(pieces)


def sound_start(path: Path) -> float:
    """The time in seconds of the first audio sample of a file."""
    with av.open(str(path)) as container:
        frame = next(container.decode(audio=0))
        return float(frame.pts * frame.time_base)


def write_unevenly(path: Path, frames: np.ndarray) -> Path:
    """Write uint8 (T, H, W, 3) frames with a longer pause after every fourth."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for k, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = 33 * k + 200 * (k // 4), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path
