"""What the tabs do: uploads checked, models called, videos written. No Gradio here.

Every function raises ValueError for what its user can mend.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from larp.codec.whole_video import Encoding, Report, reconstruct_video
from larp.data.clips import clip_to_frames
from larp.data.open_video import VideoError
from larp.data.video import probe
from larp.sampling.long_clips import sample_classes
from larp.sampling.options import GuidedSampling
from larp_mllm.demo.models import Models
from larp_mllm.generation.progress import Progress, ProgressCallback
from larp_mllm.video import Video

# What an upload may hold, and what the sliders of the page go up to.
MAX_MEGABYTES = 64
MAX_FRAMES = 1800
MAX_FPS = 120
MAX_VIDEOS = 4
MAX_SECONDS = 10
BOUNDS = (
    f"Uploads: at most {MAX_MEGABYTES} MB, {MAX_FRAMES} frames (a minute at 30 frames a second) and {MAX_FPS} frames a "
    f"second. Results: at most {MAX_VIDEOS} videos at a time, {MAX_SECONDS} new seconds of a video. One job runs at a "
    "time; the others wait. All files are deleted when the page is closed."
)
# Pixels that small videos are enlarged to.
_HEIGHT = 256


def check_upload(path: str | None) -> Path:
    """Return the path of an upload. Raises ValueError, VideoError included, without one and beyond the bounds."""
    if not path:
        raise ValueError("no video was uploaded: choose one first")
    info = probe(path)
    if Path(path).stat().st_size > MAX_MEGABYTES * 2**20:
        raise VideoError(f"{path}: is larger than {MAX_MEGABYTES} MB: cut it, or make it smaller")
    if info.frames > MAX_FRAMES:
        raise VideoError(f"{path}: has more than {MAX_FRAMES} frames: cut it")
    if info.fps > MAX_FPS:
        raise VideoError(f"{path}: has {info.fps:g} frames a second, more than {MAX_FPS}: convert it to fewer")
    return Path(path)


def write(video: Video, folder: Path) -> str:
    """Write a video as an MP4 with a name of its own in `folder`, enlarged to be seen; returns its path."""
    path = Path(mkdtemp(dir=folder)) / "video.mp4"
    return str(video.save(path, max(1, _HEIGHT // video.frames.shape[1])))


def reconstruct(models: Models, upload: str | None, num_tokens: int | None, folder: Path) -> tuple[str, Report]:
    """Encode and decode an upload; returns the path of the result, of the upload's size, and its figures.

    `num_tokens`: codes of each window, for a nested tokenizer; None: all.
    """
    path, out = check_upload(upload), Path(mkdtemp(dir=folder)) / "reconstruction.mp4"
    report = reconstruct_video(path, out, models.codec, Encoding(num_tokens=num_tokens), original_size=True)
    return str(out), report


def figures(report: Report, models: Models) -> str:
    """The figures of a reconstruction, in Markdown."""
    config = models.codec.config
    lines = [
        f"**PSNR {report.psnr:.2f} dB** over the square that the tokenizer sees ({config.width}x{config.height} pixels)",
        f"**{report.bits:.0f} bits** for {report.frames} frames: {report.codes} codes of {config.codebook_size}, "
        f"{report.bits_per_pixel:.4f} bits per pixel, {report.bits * report.fps / report.frames / 1000:.2f} kbit/s",
    ]
    return "\n\n".join([*lines, *(f"Note: {note}" for note in report.notes)])


def sample_class(
    models: Models, name: str, count: int, seed: int, guidance_scale: float, temperature: float
) -> list[Video]:
    """Sample clips of a class with the generator."""
    import torch

    sampling = GuidedSampling(guidance_scale=guidance_scale, temperature=temperature)
    generator, tokenizer, fps = models.classes
    labels = generator.class_labels([name] * count)
    with torch.inference_mode():
        clips = sample_classes(generator, tokenizer, labels, sampling=sampling, seed=seed, batch_size=count)
        return [Video(clip_to_frames(clip), fps, name) for batch in clips for clip in batch.frames]


def preview_every(models: Models) -> int:
    """Codes between two previews of a video: an eighth of them, or 0 if the tokenizer is not nested."""
    tokenizer = models.mllm.processor.video_tokenizer
    return max(1, tokenizer.num_tokens // 8) if tokenizer.config.nested else 0


class _Stopped(Exception):
    """Ends a job that nobody waits for."""


@contextmanager
def running(job: Callable[[ProgressCallback], Any]) -> Iterator[Iterator[Progress | Any]]:
    """Run a job in a thread: `with running(job) as events:` yields each `Progress` that it reports, and last its result.

    An error of the job is raised where its result would be. Leaving the block ends the job at its next report.
    """
    events: queue.Queue = queue.Queue()
    stopped = threading.Event()

    def report(progress: Progress) -> None:
        if stopped.is_set():
            raise _Stopped
        events.put((progress, None))

    def run() -> None:
        with suppress(_Stopped):
            try:
                events.put((None, job(report)))
            except BaseException as error:
                if isinstance(error, _Stopped):
                    raise
                events.put((None, error))

    def results() -> Iterator[Progress | Any]:
        while True:
            progress, result = events.get()
            if isinstance(result, BaseException):
                raise result
            yield result if progress is None else progress
            if progress is None:
                return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield results()
    finally:
        stopped.set()
        thread.join()
