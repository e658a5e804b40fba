"""Reads mutated videos of five kinds, each in a process of its own that may be lost, and counts those that behave.

    python -m tests.larp.data.fuzzed_videos --count 2000 --out fuzz.json

A video behaves if, in `SECONDS` and `MEGABYTES`, every way of reading it gives its frames or a VideoError that names it: as many
frames as `probe` says, not black.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from larp.data.audio import AudioTrack
from larp.data.video import VideoError, iter_frames, probe, read_video, write_video
from tests.larp.data.odd_videos import write_with_sound

import av
import numpy as np

KINDS = ("mp4", "avi", "mkv", "webm", "gif")
FRAMES = 40
MAX_PIXELS = 64 * 48 * 48
"""Of a frame: a size that is damaged may be any."""
SECONDS, MEGABYTES = 20, 400
"""Limits of one video, and of the memory that reading adds to a process."""


def write_sources(folder: Path) -> dict[str, bytes]:
    """Return a whole video of each kind: 40 bright frames of 48x48, of which none is black."""
    frames = np.full((FRAMES, 48, 48, 3), 90, np.uint8)
    for k, frame in enumerate(frames):
        frame[:, :, 0] = 40 + 5 * k
        frame[8:24, k : k + 8] = 250
    write_with_sound(folder / "a.mp4", frames, 20)
    write_with_sound(folder / "a.mkv", frames, 20)
    write_video(folder / "a.avi", frames, 20, codec="mpeg4")
    write_video(folder / "a.webm", frames, 20, codec="libvpx-vp9")
    write_video(folder / "a.gif", frames, 20)
    return {kind: (folder / f"a.{kind}").read_bytes() for kind in KINDS}


def mutated(data: bytes, seed: int) -> bytes:
    """Return other bytes: some set at random, or a piece cut off, taken out, repeated, zeroed or filled with noise."""
    rng, data = np.random.default_rng(seed), bytearray(data)
    for _ in range(rng.integers(1, 4)):
        size = len(data)
        # Every other mutation is near an end, where the headers are.
        place = (
            int(rng.integers(size)) if rng.random() < 0.5 else int(rng.integers(min(size, 1500)) * rng.choice([-1, 1]))
        )
        place, length = place % size, int(rng.integers(1, max(2, size // 8)))
        match rng.integers(6):
            case 0:
                for at in (place + rng.integers(0, 200, rng.integers(1, 32))) % size:
                    data[at] = int(rng.integers(256))
            case 1:
                del data[max(64, place) :]
            case 2:
                del data[place : place + length]
            case 3:
                data[place:place] = data[place : place + length]
            case 4:
                data[place : place + length] = bytes(len(data[place : place + length]))
            case 5:
                data[place : place + length] = rng.bytes(len(data[place : place + length]))
    return bytes(data)


def fault(path: Path) -> tuple[str, str]:
    """Read a video in every way; return ("", what happened) if it behaves, else (what is wrong, ...)."""
    try:
        try:
            info = probe(path, MAX_PIXELS)
            frames, _ = read_video(path, max_pixels=MAX_PIXELS)
            number = len(list(iter_frames(path, MAX_PIXELS)))
        except VideoError as error:
            return ("" if str(path) in str(error) else f"an error that does not name the file: {error}"), "refused"
        if number != len(frames):
            return f"{len(frames)} frames read, {number} one by one", ""
        if len(frames) < info.frames - max(2, info.frames // 50):
            return f"{len(frames)} frames of {info.frames} are read without an error", ""
        if (frames.reshape(len(frames), -1).max(1) < 32).mean() > 0.1:
            return "frames are black", ""
        try:
            part, _ = read_video(path, info.frames // 2, max(1, info.frames // 4), 1, MAX_PIXELS)
            if len(part) != max(1, info.frames // 4):
                return "a part is short", ""
            with AudioTrack(path) as audio:
                if audio.stream is not None:
                    sum(1 for _ in audio.packets(None))
        except VideoError as error:
            return (
                "" if str(path) in str(error) else f"an error that does not name the file: {error}"
            ), "refused in part"
        return "", "whole" if len(frames) == FRAMES else "other frames"
    except Exception as error:
        return f"{type(error).__name__}: {error}", ""


def _serve(pipe) -> None:
    """Answer each path with `fault` of it and the peak of memory in MB."""
    while (path := pipe.recv()) is not None:
        pipe.send((*fault(Path(path)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))


class _Reader:
    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.used = None

    def ask(self, path: Path) -> tuple[str, str]:
        """Return `fault` of a path, or what became of the process, which is then of no more use."""
        self.pipe.send(str(path))
        try:
            if not self.pipe.poll(SECONDS if self.used else 10 * SECONDS):  # the first time it imports
                self.process.kill()
                return f"takes over {SECONDS} s", "lost"
            wrong, how, peak = self.pipe.recv()
        except EOFError:
            self.process.join()
            return f"ends the process with {self.process.exitcode}", "lost"
        self.used, grown = peak, peak - (self.used or peak)
        return (wrong or f"takes {grown} MB" if grown > MEGABYTES else wrong), how


def fuzz(count: int, first: int = 0) -> dict:
    """Read `count` mutated videos, the kinds in turn; return what happened to them."""
    found, faults = Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        sources, reader = write_sources(folder), _Reader()
        for kind in sources:
            wrong, how = reader.ask(folder / f"a.{kind}")
            assert not wrong and how == "whole", (kind, wrong, how)
        for number in range(first, first + count):
            kind = KINDS[number % len(KINDS)]
            path = folder / f"bad.{kind}"
            path.write_bytes(mutated(sources[kind], number))
            wrong, how = reader.ask(path)
            if how == "lost":
                reader = _Reader()
            found[how or "fault"] += 1
            if wrong:
                faults.append(f"{number} ({kind}): {wrong}")
        reader.pipe.send(None)
    return {"videos": count, "first": first, "behaved": count - len(faults), "found": dict(found), "faults": faults}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    began = time.time()
    report = fuzz(arguments.count, arguments.first)
    report |= {
        "command": " ".join(["python -m tests.larp.data.fuzzed_videos", *sys.argv[1:]]),
        "seconds": round(time.time() - began),
    }
    report |= {"pyav": av.__version__, "date": time.strftime("%Y-%m-%d")}
    print(json.dumps(report, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
