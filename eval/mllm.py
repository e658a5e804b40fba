"""Do the videos of a language model show what the prompt says? An analytic checker evaluates videos for held-out prompts:

    python eval/mllm.py --protocol shapes                      # the newest model trained here
    python eval/mllm.py --model runs/mllm/model --guidance-scale 2

Prints and writes the shares of videos with the right colour, direction and shape, what is left of them in reconstructions of such
videos, which is the limit that the tokenizer sets, the protocol, and a contact sheet.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from larp.config import parse, to_dict
from larp.data.clips import pixels_to_clip
from larp.data.contact_sheet import contact_sheet
from larp.data.shapes import HELD_OUT, Attributes, held_out_prompts, parse_caption, render
from larp.engine.signals import run_script
from larp.files import check_writable, write_json
from larp.metrics.protocols import checkpoint_hashes, versions
from larp.metrics.shape_checker import read_blob, score
from larp.models.tokenizer import LarpTokenizer
from larp_mllm.generation.sampling import VideoSampling
from larp_mllm.locate import RUN_MODEL, find_model
from larp_mllm.pipeline import Mllm
from larp_mllm.video import Video

import torch
from torch import Tensor


@dataclass(frozen=True)
class EvalMllmConfig(VideoSampling):
    """Score videos that a language model generates for prompts it was not trained on."""

    model: Path | None = None
    """Folder of the model, or of the run that trained it; by default LARP_MLLM_MODEL, else the newest one trained here."""
    protocol: Literal["shapes"] = "shapes"
    """shapes: prompts of (colour, shape, direction) triples of which the train split of `shapes:` has none."""
    num_prompts: int = 64
    out: Path | None = None
    """Where the JSON goes, the contact sheet (.png) beside it; by default eval-mllm.json in the run of the model, else here."""

    def __post_init__(self):
        super().__post_init__()
        if self.num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {self.num_prompts}")
        if self.out is not None and self.out.suffix.lower() == ".png":
            raise ValueError(f"out is {self.out}, where the contact sheet goes: give the name of the .json")


def main(argv: Sequence[str] | None = None) -> dict:
    """Run the command line `argv` (by default the program's own) and return the record."""
    config, _ = parse(EvalMllmConfig, sys.argv[1:] if argv is None else argv, Path(__file__).parent, "mllm.py")
    return evaluate(config)


def evaluate(config: EvalMllmConfig) -> dict:
    """Generate and score the videos, write the JSON and the contact sheet, and return the record."""
    folder = find_model(config.model)
    # Not into the package, or the hub's cache.
    out = config.out or (folder.parent if folder.name == RUN_MODEL else Path()) / "eval-mllm.json"
    check_writable(out)
    check_writable(out.with_suffix(".png"))
    settings = protocol(config, folder)
    began = time.monotonic()
    prompts = held_out_prompts(config.num_prompts)
    mllm = Mllm.load(folder)
    videos = mllm.generate(prompts, sampling=VideoSampling.of(config))
    seconds = time.monotonic() - began
    clips = [pixels_to_clip(video.frames) for video in videos]
    expected = [parse_caption(prompt) for prompt in prompts]
    record = {
        **score(clips, expected),
        "reconstructed": score(reconstructions(mllm.processor.video_tokenizer, expected), expected),
        "seconds": round(seconds, 2),
        "protocol": settings,
        "videos": [
            {
                "prompt": prompt,
                **{k: v for k, v in asdict(read_blob(clip)).items() if k in ("colour", "shape", "direction")},
            }
            for prompt, clip in zip(prompts, clips, strict=True)
        ],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, record)
    report(record, videos[:16], out)
    return record


def reconstructions(tokenizer: LarpTokenizer, attributes: list[Attributes]) -> list[Tensor]:
    """Return rendered videos of these attributes, encoded and decoded: float (3, T, H, W)."""
    frames, size, _ = tokenizer.config.clip_shape
    clips = [pixels_to_clip(render(each, seed, size, frames)) for seed, each in enumerate(attributes)]
    return [clip for batch in torch.stack(clips).split(16) for clip in tokenizer.decode(tokenizer.encode(batch))]


def protocol(config: EvalMllmConfig, folder: Path) -> dict:
    """Everything that changes the score; the checkpoint by the SHA-256 of each of its files of weights."""
    return {
        "name": config.protocol,
        "prompts": f"larp.data.shapes.held_out_prompts({config.num_prompts}), of {len(HELD_OUT)} held-out triples",
        "checker": "larp.metrics.shape_checker",
        "one_video_per_prompt": True,
        **to_dict(VideoSampling.of(config)),
        "model": str(folder),
        "checkpoint": checkpoint_hashes(folder),
        "versions": versions("transformers", "numpy", "av"),
    }


def report(record: dict, videos: list[Video], out: Path) -> None:
    """Print the score, the tokenizer's limit and the protocol, and write the contact sheet."""
    sheet = out.with_suffix(".png")
    contact_sheet([video.frames for video in videos], [video.prompt for video in videos], sheet)
    settings = record["protocol"]
    print(f"{shares(record)} of {record['n']} videos")
    print(f"of rendered videos through the tokenizer: {shares(record['reconstructed'])}")
    sampled = ", ".join(f"{name} {settings[name]}" for name in ("guidance_scale", "temperature", "seed"))
    print(f"protocol: {settings['prompts']}; {sampled}")
    print(f"wrote {out} and {sheet}")


def shares(scores: dict) -> str:
    """The three accuracies as text."""
    return ", ".join(f"{name} {scores[f'{name}_accuracy']:.1%}" for name in ("colour", "direction", "shape"))


if __name__ == "__main__":
    run_script("mllm.py", main)
