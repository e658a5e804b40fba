"""Samples of a language model during training and at its end: videos for captions, captions for videos."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from larp.data.contact_sheet import contact_sheet
from larp.data.video import movies_are_written
from larp.files import write_json
from larp_mllm.data.dataset import CaptionedVideos, evaluation_rows
from larp_mllm.generation.decode import decode_text
from larp_mllm.generation.sampling import TextSampling, VideoSampling
from larp_mllm.pipeline import Mllm

SHEET, CAPTIONS = "sheet.png", "captions.json"
_SMALLEST = 256  # pixels of height to scale MP4s up to: players blur smaller ones


@dataclass(frozen=True)
class SamplingConfig:
    """Videos and captions that are sampled in training."""

    every: int = 0
    """Write a contact sheet and captions to samples/step-NUMBER every n steps; 0 writes none before the end."""
    videos: int = 8
    """Videos to sample for captions of held-out videos, and held-out videos to caption; 0 samples nothing."""
    guidance_scale: float = 2.0
    """Scale of classifier-free guidance of the videos, 0 to 1000; 1 is off."""
    temperature: float = 0.8
    """Divides the logits of the videos' codes, 1e-4 to 1e6; 0 always takes the likeliest."""

    def __post_init__(self):
        for name in ("every", "videos"):
            if getattr(self, name) < 0:
                raise ValueError(f"sampling.{name} is {getattr(self, name)}; it must be 0 (none) or more")
        self.sampling(0)

    def sampling(self, seed: int) -> VideoSampling:
        """Return the sampling options."""
        return VideoSampling(guidance_scale=self.guidance_scale, temperature=self.temperature, seed=seed)


def write_samples(
    mllm: Mllm, held_out: CaptionedVideos, config: SamplingConfig, seed: int, folder: Path, movies: bool
) -> list[str]:
    """Write videos for held-out captions as a contact sheet, and captions of the held-out videos as captions.json.

    The prompts are distinct captions of evenly spaced rows. movies: write an MP4 file of each video as well, if PyAV is
    installed. Returns the paths, the sheet first.
    """
    first_rows: dict[str, int] = {}
    for row in evaluation_rows(len(held_out), len(held_out)):
        first_rows.setdefault(held_out.phrases[row][0], row)
    rows = [list(first_rows.values())[i] for i in evaluation_rows(len(first_rows), config.videos)]
    if not rows:
        return []
    texts = [held_out.phrases[row][0] for row in rows]
    videos = mllm.generate(texts, sampling=config.sampling(seed))
    folder.mkdir(parents=True, exist_ok=True)
    contact_sheet([video.frames for video in videos], texts, folder / SHEET)
    write_json(folder / CAPTIONS, describe_rows(mllm, held_out, rows))
    files = [folder / SHEET, folder / CAPTIONS]
    if movies and movies_are_written():
        scale = max(1, _SMALLEST // videos[0].frames.shape[1])
        for number, (video, text) in enumerate(zip(videos, texts, strict=True)):
            slug = re.sub(r"[^a-z0-9]+", "-", text.lower())[:60].strip("-")
            files.append(video.save(folder / f"{number:02d}-{slug}.mp4", scale))
    return [str(path) for path in files]


def describe_rows(mllm: Mllm, data: CaptionedVideos, rows: list[int]) -> list[dict[str, Any]]:
    """Return for each row the video's name, its own captions, and the caption that the model writes for its codes."""
    layout = mllm.processor.layout
    questions = [layout.question(data.cache.codes[row].tolist()) for row in rows]
    stops = [] if layout.eos is None else [layout.eos]
    answers = decode_text(mllm.model, questions, TextSampling(), stops)
    return [
        {
            "video": data.cache.names[row],
            "captions": list(data.phrases[row]),
            "described": mllm.processor.decode_text(ids),
        }
        for row, ids in zip(rows, answers, strict=True)
    ]
