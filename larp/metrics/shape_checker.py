"""An analytic classifier of shape videos: it detects the coloured blob of each frame and reads colour, shape and direction.

It is deterministic and not trained. The colour is the hue of the blob's pixels, the direction that of a line fitted to
its centres, and the shape the best match among rendered templates of similar area.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from larp.data.shapes import COLOURS, DIRECTIONS, SHAPES, Attributes, coverage

import numpy as np
import torch

# Minimum saturation (largest minus smallest channel) of a coloured pixel. Noise of 0.03 on grey is below it; the palest
# of COLOURS has 0.63.
_MIN_SATURATION = 0.25
_MIN_AREA = 0.003  # minimum share of the frame covered by a blob; the built-in ones cover about 0.08
_MIN_COHERENCE = 0.4  # minimum agreement of hues within a blob, see _coherence
_MIN_TRAVEL = 0.06  # shorter paths, as a share of the frame's shorter side, have no direction


@dataclass(frozen=True)
class BlobReading:
    """The attributes read from a clip; a field that cannot be determined is None, with confidence 0.

    Confidences are in [0, 1]; 0 means that the second-best value fits equally well. `travel` is the length of the path as
    a share of the frame's shorter side (0.25 is slow and 0.5 quick in the built-in videos). `found` is the share of
    frames with a blob.
    """

    colour: str | None = None
    shape: str | None = None
    direction: str | None = None
    colour_confidence: float = 0.0
    shape_confidence: float = 0.0
    direction_confidence: float = 0.0
    travel: float = 0.0
    found: float = 0.0


def read_blob(clip: torch.Tensor) -> BlobReading:
    """Read colour, shape and direction of the blob in a clip, float (3, T, H, W) in [0, 1].

    All fields are None unless at least half of the frames have a blob. Raises ValueError for other tensor shapes.
    """
    if clip.ndim != 4 or clip.shape[0] != 3:
        raise ValueError(f"a clip is (3, T, H, W), not {tuple(clip.shape)}")
    pixels = clip.detach().float().cpu().numpy().transpose(1, 2, 3, 0)  # T H W 3
    weight, present = _blob_weight(pixels)
    found = float(present.mean())
    if found < 0.5:
        return BlobReading(found=found)
    pixels, weight = pixels[present], weight[present]
    chroma = pixels - pixels.mean(axis=-1, keepdims=True)
    if _coherence(chroma, weight) < _MIN_COHERENCE:
        return BlobReading()
    colour, colour_confidence, hue = _colour(chroma, weight)
    x, y = _centres(weight)
    direction, direction_confidence, travel = _direction(
        np.flatnonzero(present), x, y, pixels.shape[0], pixels.shape[1:3]
    )
    shape, shape_confidence = _shape(chroma @ hue, weight, x, y)
    return BlobReading(
        colour, shape, direction, colour_confidence, shape_confidence, direction_confidence, travel, found
    )


def score(clips: Iterable[torch.Tensor], expected: Sequence[Attributes]) -> dict[str, float]:
    """Compare the attributes read from clips with the expected ones.

    Returns colour_accuracy, direction_accuracy and shape_accuracy in [0, 1], and n, the number of clips; a field that is
    None counts as wrong. Raises ValueError if the numbers of clips and attributes differ or are 0.
    """
    readings = [read_blob(clip) for clip in clips]
    if len(readings) != len(expected) or not readings:
        raise ValueError(
            f"{len(readings)} clips and {len(expected)} expected attributes; need the same number, at least 1"
        )
    result = {
        f"{name}_accuracy": float(
            np.mean([getattr(r, name) == getattr(e, name) for r, e in zip(readings, expected, strict=True)])
        )
        for name in ("colour", "direction", "shape")
    }
    return {**result, "n": len(readings)}


def _blob_weight(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the saturation of pixels inside the blob, 0 outside, (T, H, W), and which frames have a blob, (T,)."""
    saturation = pixels.max(axis=-1) - pixels.min(axis=-1)
    area = saturation.shape[1] * saturation.shape[2]
    few = max(2, round(_MIN_AREA * area))
    # The few-th largest value, because a single outlier must not set the threshold.
    peak = np.partition(saturation.reshape(len(saturation), -1), area - few, axis=1)[:, area - few]
    mask = saturation > np.maximum(_MIN_SATURATION, 0.5 * peak)[:, None, None]
    return np.where(mask, saturation, 0.0), (peak > _MIN_SATURATION) & (mask.sum(axis=(1, 2)) >= few)


def _coherence(chroma: np.ndarray, weight: np.ndarray) -> float:
    """Return the agreement of hues of the blob's pixels: 1 for one colour, about 0 for coloured noise."""
    together = np.linalg.norm(np.einsum("thwc,thw->c", chroma, weight))
    return float(together / max((np.linalg.norm(chroma, axis=-1) * weight).sum(), 1e-9))


def _colour(chroma: np.ndarray, weight: np.ndarray) -> tuple[str, float, np.ndarray]:
    """Return the nearest colour by hue, its confidence, and the blob's unit chroma vector (3,)."""
    mean = np.einsum("thwc,thw->c", chroma, weight)
    hue = mean / max(np.linalg.norm(mean), 1e-9)
    table = np.array(list(COLOURS.values()), dtype=np.float64)
    table -= table.mean(axis=1, keepdims=True)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    angles = np.arccos(np.clip(table @ hue, -1, 1))
    first, second = np.sort(angles)[:2]
    return list(COLOURS)[int(angles.argmin())], float((second - first) / (second + first)), hue


def _centres(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the weighted centre of each frame, x (T,) and y (T,), in pixels from the top left corner."""
    total = weight.sum(axis=(1, 2))
    x = weight.sum(axis=1) @ (np.arange(weight.shape[2]) + 0.5) / total
    y = weight.sum(axis=2) @ (np.arange(weight.shape[1]) + 0.5) / total
    return x, y


def _direction(times: np.ndarray, x: np.ndarray, y: np.ndarray, seen: int, size: tuple[int, int]):
    """Fit a line to the centres; return direction (None without motion), confidence and travel."""
    if seen < 2:
        return None, 0.0, 0.0
    length = times[-1] - times[0]
    dx, dy = (float(np.polyfit(times, centre, 1)[0]) * length / min(size) for centre in (x, y))
    travel = float(np.hypot(dx, dy))
    if travel < _MIN_TRAVEL:
        return None, 0.0, travel
    along = {name: dx * sx + dy * sy for name, (sx, sy) in DIRECTIONS.items()}
    return max(along, key=along.get), float(1 - min(abs(dx), abs(dy)) / max(abs(dx), abs(dy))), travel


def _shape(strength: np.ndarray, weight: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[str, float]:
    """Correlate the blob, averaged over frames around its centre, with templates of several sizes and blurs.

    `strength` (T, H, W) is the component of each pixel along the blob's colour. Returns the shape and its confidence.
    """
    # In tenths of a pixel, so that templates are shared between clips.
    size = round(10 * float((weight > 0).sum(axis=(1, 2)).mean()) ** 0.5)
    window = _window(size)
    mean = _aligned_mean(strength, x, y, window)
    mean = (mean - mean.mean()).ravel()
    mean /= max(np.linalg.norm(mean), 1e-9)
    best = {name: float((_templates(name, size) @ mean).max()) for name in SHAPES}
    second, first = sorted(best.values())[-2:]
    return max(best, key=best.get), min(1.0, (first - second) / max(1 - second, 1e-9))


def _window(size: int) -> np.ndarray:
    half = int(np.ceil(0.13 * size)) + 1
    return np.arange(-half, half + 1)


def _aligned_mean(strength: np.ndarray, x: np.ndarray, y: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Average a window around the centre of each frame, with bilinear interpolation and zero padding."""
    frames, height, width = strength.shape
    padded = np.pad(strength, ((0, 0), (1, 1), (1, 1)))
    # Pixel 0 has index 1 after padding and its centre at 0.5, hence + 0.5.
    rows = np.clip(y[:, None] + 0.5 + window, 0, height + 0.999)
    columns = np.clip(x[:, None] + 0.5 + window, 0, width + 0.999)
    r, c = rows.astype(int), columns.astype(int)
    fr, fc, t = (rows - r)[:, :, None], (columns - c)[:, None, :], np.arange(frames)[:, None, None]

    def at(down: int, along: int) -> np.ndarray:
        return padded[t, (r + down)[:, :, None], (c + along)[:, None, :]]

    top = at(0, 0) * (1 - fc) + at(0, 1) * fc
    return (top * (1 - fr) + (at(1, 0) * (1 - fc) + at(1, 1) * fc) * fr).mean(axis=0)


@lru_cache(maxsize=256)
def _templates(name: str, size: int) -> np.ndarray:
    """Return templates of a shape in sizes around `size` (root of the area, in tenths of a pixel) with several blurs.

    One flattened window per row, with mean 0 and norm 1. Most are smaller than `size`, because blur increases the
    thresholded area.
    """
    window, side, rows = _window(size), size / 10, []
    dx, dy = window[None, :].astype(float), window[:, None].astype(float)
    radius = side / _UNIT_AREA[name] ** 0.5
    for blur in (0.0, 0.06, 0.12, 0.18, 0.24):
        taps = np.exp(-0.5 * ((window[:, None] - window[None]) / max(blur * side, 0.3)) ** 2)
        taps /= taps.sum(axis=1, keepdims=True)
        for factor in (0.7, 0.8, 0.9, 1.0, 1.1):
            for shift in (-0.06, 0.0, 0.06):
                row = (taps @ coverage(name, dx, dy + shift * radius, radius * factor) @ taps.T).ravel()
                row -= row.mean()
                rows.append(row / np.linalg.norm(row))
    return np.stack(rows)


_GRID = (np.arange(96) - 47.5) / 24
_UNIT_AREA = {name: float(coverage(name, _GRID[None] * 24, _GRID[:, None] * 24, 24.0).sum()) / 24**2 for name in SHAPES}
