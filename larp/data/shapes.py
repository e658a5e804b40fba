"""The built-in captioned videos of one moving coloured shape, rendered once and stored as MP4 files.

Of the 72 triples of six colours, three shapes and four directions, 16 (`HELD_OUT`) never appear in the train split: a
model that generates one of them composes attributes that it has only seen apart. A seed gives the same pixels on every
machine.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from larp import files
from larp.data.video import write_video

import numpy as np
from tqdm import tqdm

VERSION = 2
FPS = 8.0
COLOURS = {
    "red": (235, 40, 40), "green": (40, 205, 60), "blue": (45, 75, 240),
    "yellow": (240, 220, 40), "magenta": (230, 50, 220), "cyan": (40, 220, 230),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slowly": 0.25, "quickly": 0.5}
PHRASES = (
    "a {colour} {shape} moving {direction}", "a {colour} {shape} moves {direction}",
    "a {colour} {shape} that is moving {direction}", "there is a {colour} {shape} moving {direction}",
)  # fmt: skip
# Each colour occurs 2 or 3 times, each shape 5 or 6 times and each direction 4 times. Every pair of values (colour and
# shape, colour and direction, shape and direction) stays in the train split.
HELD_OUT = frozenset(
    (tuple(COLOURS)[k % 6], SHAPES[(k + k // 6) % 3], tuple(DIRECTIONS)[(k + k // 4) % 4]) for k in range(16)
)
_TEST_SHARE = 8


@dataclass(frozen=True)
class Attributes:
    """The contents of a shape video: keys of COLOURS, SHAPES, DIRECTIONS and SPEEDS (speed None: unspecified)."""

    colour: str
    shape: str
    direction: str
    speed: str | None = None

    @property
    def triple(self) -> tuple[str, str, str]:
        """Colour, shape and direction, which decide whether a video is held out."""
        return self.colour, self.shape, self.direction


def held_out(triple: tuple[str, str, str]) -> bool:
    """Whether a (colour, shape, direction) triple is excluded from the train split."""
    return tuple(triple) in HELD_OUT


def caption(attributes: Attributes, phrase: int = 0, say_speed: bool = False) -> str:
    """Return a caption by one of PHRASES, with the speed as its last word if `say_speed`."""
    text = PHRASES[phrase].format(**asdict(attributes))
    return f"{text} {attributes.speed}" if say_speed and attributes.speed else text


def parse_caption(text: str) -> Attributes:
    """Parse the attributes of a caption. Raises ValueError unless it names one colour, one shape and one direction."""
    words = re.findall(r"[a-z]+", text.lower())
    found = {
        name: [value for value in values if value in words]
        for name, values in (("colour", COLOURS), ("shape", SHAPES), ("direction", DIRECTIONS), ("speed", SPEEDS))
    }
    for name, values in (("colour", COLOURS), ("shape", SHAPES), ("direction", DIRECTIONS)):
        if len(found[name]) != 1:
            raise ValueError(
                f"caption {text!r} must name one {name} of {', '.join(values)}; it names {found[name] or 'none'}"
            )
    return Attributes(found["colour"][0], found["shape"][0], found["direction"][0], next(iter(found["speed"]), None))


def held_out_prompts(n: int = 64) -> list[str]:
    """Return n captions of held-out triples, starting with "a red circle moving left".

    Every triple in the first phrasing, then with each speed, then in the other phrasings; they repeat beyond 96.
    """
    colours, directions = list(COLOURS), list(DIRECTIONS)
    triples = sorted(HELD_OUT, key=lambda t: (directions.index(t[2]), colours.index(t[0]), SHAPES.index(t[1])))
    triples.sort(key=lambda t: t != ("red", "circle", "left"))
    prompts = [caption(Attributes(*triple)) for triple in triples]
    prompts += [caption(Attributes(*triple, speed), say_speed=True) for speed in SPEEDS for triple in triples]
    prompts += [caption(Attributes(*triple), phrase) for phrase in range(1, len(PHRASES)) for triple in triples]
    return [prompts[k % len(prompts)] for k in range(n)]


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray | float) -> np.ndarray:
    """Return the coverage of each pixel by a shape, in [0, 1].

    Args:
        shape: one of SHAPES.
        x, y: pixel coordinates relative to the centre of mass, y pointing down.
        radius: of the circle in pixels; square and triangle have about the same area.

    Edges are antialiased by the distance of the pixel's centre.
    """
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius
    else:  # an equilateral triangle pointing up; its inner radius is half its outer one
        half = 0.66 * radius
        distance = np.maximum(y, 0.75**0.5 * np.abs(x) - 0.5 * y) - half
    return np.clip(0.5 - distance, 0.0, 1.0)


def render(attributes: Attributes, seed: int, size: int = 32, frames: int = 16) -> np.ndarray:
    """Render a shape video, uint8 (frames, size, size, 3); the seed sets background, radius, start and exact speed."""
    generator = random.Random(f"larp-shapes-{VERSION}-{seed}")
    radius = size / 6 * generator.uniform(0.9, 1.1)
    background = generator.uniform(16, 48)
    speed = SPEEDS[attributes.speed or generator.choice(tuple(SPEEDS))]
    # The largest extent of any shape from its centre, so that the start position does not reveal the shape.
    left, top, right, bottom = (factor * radius + 0.5 for factor in (1.15, 1.32, 1.15, 1.0))
    low, high = (left, top), (size - right, size - bottom)
    step = DIRECTIONS[attributes.direction]
    room = min(high[k] - low[k] for k in range(2) if step[k])
    travel = min(size * speed * generator.uniform(0.92, 1.08), room)
    centre = [generator.uniform(low[k] + travel * (step[k] < 0), high[k] - travel * (step[k] > 0)) for k in range(2)]
    time = np.linspace(0.0, travel, frames)[:, None, None]
    grid = np.arange(size) + 0.5
    alpha = coverage(
        attributes.shape,
        grid[None, None, :] - centre[0] - time * step[0],
        grid[None, :, None] - centre[1] - time * step[1],
        radius,
    )
    colour = np.array(COLOURS[attributes.colour], dtype=np.float64)
    picture = background + alpha[..., None] * (colour - background)
    return np.round(picture).astype(np.uint8)


def sample_attributes(count: int, seed: int, split: str) -> list[tuple[Attributes, str]]:
    """Sample `count` (attributes, caption) pairs for split "train" (no held-out triple) or "test" (only held-out ones)."""
    generator = random.Random(f"larp-shapes-{VERSION}-{split}-{seed}")
    triples = [
        (c, s, d) for c in COLOURS for s in SHAPES for d in DIRECTIONS if held_out((c, s, d)) == (split == "test")
    ]
    pairs = []
    for k in range(count):
        if k % len(triples) == 0:
            generator.shuffle(triples)
        attributes = Attributes(*triples[k % len(triples)], generator.choice(tuple(SPEEDS)))
        phrase = 0 if generator.random() < 0.5 else generator.randrange(1, len(PHRASES))
        pairs.append((attributes, caption(attributes, phrase, say_speed=generator.random() < 0.5)))
    return pairs


def video_seed(seed: int, split: str, index: int) -> int:
    """Return the seed with which video `index` of a split is rendered."""
    return seed * 1_000_003 + (500_000_000 if split == "test" else 0) + index


def cache_folder() -> Path:
    """Return the folder of the built-in videos: $LARP_DATA, by default ~/.cache/larp."""
    return files.cache_folder("LARP_DATA")


def materialise(split: str, count: int = 4096, seed: int = 0, size: int = 32, frames: int = 16) -> Path:
    """Return the folder of one split's MP4 files and `manifest.jsonl`, rendered first if it does not exist.

    `count` is the size of the train split; the test split has an eighth of it, at least 16. Files are x264 in 4:4:4,
    because half-resolution colour would blur a 32x32 frame. The folder is renamed into place when complete, so that
    interrupted and concurrent renderings are safe. Raises ValueError for sizes that cannot be rendered.
    """
    for name, value, least in (("count", count, 1), ("size", size, 16), ("frames", frames, 2)):
        if value < least:
            raise ValueError(f"shapes: {name}={value} is too small; the least is {least}")
    name = Path(f"shapes-v{VERSION}-{size}x{frames}-n{count}-seed{seed}", split)
    folder = cache_folder() / name
    if _is_rendered(folder):
        return folder
    try:
        temporary = _new_folder(folder.parent, f".{split}-")
    except OSError as error:
        # A home that cannot be written keeps nobody from the built-in videos; a folder that was asked for does.
        if "LARP_DATA" in os.environ:
            raise ValueError(f"LARP_DATA: {files.error_line(error)}; name another folder") from error
        folder = files.temporary_folder() / name
        if _is_rendered(folder):
            return folder
        print(f"note: {files.error_line(error)}; the built-in videos are rendered into {folder}", file=sys.stderr)
        temporary = _new_folder(folder.parent, f".{split}-")
    try:
        _write_split(temporary, split, count if split == "train" else max(16, count // _TEST_SHARE), seed, size, frames)
        temporary.rename(folder)
    except OSError:
        # Another process was faster; its folder holds the same pixels.
        if not _is_rendered(folder):
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _is_rendered(folder: Path) -> bool:
    return (folder / "manifest.jsonl").is_file()


def _new_folder(parent: Path, prefix: str) -> Path:
    """Create a folder of a new name, with the permissions of other new folders."""
    folder = parent / f"{prefix}{secrets.token_hex(6)}"
    folder.mkdir(parents=True)
    return folder


def _write_split(folder: Path, split: str, count: int, seed: int, size: int, frames: int) -> None:
    lines = []
    pairs = sample_attributes(count, seed, split)
    for k, (attributes, text) in enumerate(tqdm(pairs, desc=f"rendering shapes ({split})", unit="video", delay=1)):
        name = f"{k:06d}.mp4"
        pixels = render(attributes, video_seed(seed, split, k), size, frames)
        write_video(folder / name, pixels, FPS, quality=8, pixel_format="yuv444p", preset="ultrafast")
        lines.append(json.dumps({"path": name, "caption": text, **asdict(attributes)}))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
