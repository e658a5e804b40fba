"""How quality grows with the number of codes, in one command:

    python eval/rate_distortion.py --tokenizer runs/nested/model --compare runs/fixed/model --data ucf101:ROOT --out curve.json

Decodes every clip from prefixes of its codes with a tokenizer trained with --model.nested. Tokenizers with a fixed number of codes
are plotted as points for comparison. Writes the figures, a plot, and a sheet of pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from bench.plots import open_pyplot
from larp.config import to_dict
from larp.data.clips import ClipShape, clip_to_frames
from larp.data.contact_sheet import contact_sheet
from larp.data.datasets import evenly_spaced, open_videos
from larp.data.loader import iterate_once
from larp.engine.signals import run_script
from larp.files import write_json
from larp.metrics.evaluation import run_evaluation
from larp.metrics.protocols import check_record_path, versions
from larp.metrics.psnr_ssim import mean_colour, ssim
from larp.models.losses import psnr
from larp.models.tokenizer import LarpTokenizer

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm


@dataclass(frozen=True)
class CurveConfig:
    """Measure PSNR and SSIM of a nested tokenizer for prefixes of its codes."""

    tokenizer: str = ""
    """Folder or hub name of a tokenizer trained with --model.nested (needed)."""
    variant: Literal["ema"] | None = None
    """ema: the averaged weights of the tokenizer's training."""
    data: str = ""
    """Data spec of the videos, as in training (needed)."""
    split: Literal["train", "test", "all"] = "test"
    """Which of them; the centre of every video is measured."""
    compare: tuple[str, ...] = ()
    """Tokenizers for clips of the same size to compare with, each with all its codes."""
    lengths: tuple[int, ...] = ()
    """Numbers of codes; by default powers of two and all."""
    targets: tuple[float, ...] = ()
    """PSNRs in dB; for each, every clip gets the fewest codes that reach it (`encode(clip, target_psnr=...)`)."""
    out: Path = Path("rate-distortion.json")
    """Where the figures go; the plot and the sheet get the same name with -curve.png and -clips.png."""
    batch_size: int = 16
    """Clips at a time."""
    show: int = 4
    """Clips in the sheet of pictures; 0 writes none."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the models run."""

    def __post_init__(self):
        if self.batch_size < 1 or self.show < 0:
            raise ValueError(f"batch_size={self.batch_size} and show={self.show} must be at least 1 and 0")


def lengths_of(config: CurveConfig, model: LarpTokenizer) -> list[int]:
    """The numbers of codes to measure; ValueError for those that the tokenizer does not have."""
    model.check_length(1)
    powers = [2**k for k in range(model.num_tokens.bit_length()) if 2**k < model.num_tokens]
    return sorted({model.check_length(n) for n in config.lengths or (*powers, model.num_tokens)})


def likeness(clip: Tensor, again: Tensor) -> Tensor:
    """PSNR and SSIM of each clip: (B, 2) float64 on the CPU."""
    return torch.stack([psnr(clip, again), ssim(clip, again)], dim=1).double().cpu()


@torch.no_grad()
def measure(
    config: CurveConfig, model: LarpTokenizer, others: list[LarpTokenizer]
) -> tuple[dict[str, list], list[np.ndarray]]:
    """Return rows (n, 2 or 3) of likeness by name (a length, a target, a number of `others`, mean_colour), and pictures."""
    videos = open_videos(config.data, config.split)
    once = iterate_once(videos, ClipShape(*model.config.clip_shape), config.batch_size)
    rows: dict[str, list[Tensor]] = {}
    sheet: list[np.ndarray] = []
    shown = evenly_spaced(range(len(videos)), config.show)
    for batch in tqdm(once, desc="clips", unit="batch", delay=2):
        clip = batch["clip"].to(config.device)
        codes = model.encode(clip)
        again = {f"length {n}": model.decode(codes[:, :n]) for n in lengths_of(config, model)}
        again |= {f"other {k}": other.decode(other.encode(clip)) for k, other in enumerate(others)}
        again |= {"mean_colour": mean_colour(clip)}
        for name, decoded in again.items():
            rows.setdefault(name, []).append(likeness(clip, decoded))
        for target in config.targets:
            needed = model.shortest_prefix(clip, codes, target)
            decoded = model.decode_latents(model.mask(model.quantizer.lookup(codes), needed)).float().clamp(0, 1)
            used = needed[:, None].double().cpu()
            rows.setdefault(f"target {target}", []).append(torch.cat([likeness(clip, decoded), used], dim=1))
        strips = [clip, *(again[f"length {n}"] for n in lengths_of(config, model))]
        for place, index in enumerate(batch["index"].tolist()):
            if index in shown:
                sheet.append(np.concatenate([clip_to_frames(strip[place]) for strip in strips], axis=1))
    if not rows:
        raise ValueError(f"{config.data}: none of its {len(videos)} {config.split} videos can be read")
    return {name: torch.cat(parts).tolist() for name, parts in rows.items()}, sheet


def point(rows: list, tokens: float, codebook_size: int, pixels: int) -> dict[str, float]:
    """Means over the clips of one way of coding them."""
    bits = tokens * math.log2(codebook_size)
    values = np.asarray(rows)
    return {"num_tokens": tokens, "bits_per_clip": bits, "bits_per_pixel": bits / pixels,
            "psnr": values[:, 0].mean(), "ssim": values[:, 1].mean(), "lowest_psnr": values[:, 0].min()}  # fmt: skip


def adaptive(target: float, rows: np.ndarray, codebook_size: int, pixels: int) -> dict[str, float]:
    """What codes for a target PSNR cost, and how many codes for every clip would reach it as often."""
    reached = rows[:, 0] >= target
    alike = int(rows[reached, 2].max()) if reached.any() else None
    return {"target_psnr": target, "reached": float(reached.mean()), "num_tokens_for_all": alike} | point(
        rows, float(rows[:, 2].mean()), codebook_size, pixels
    )


def evaluate(config: CurveConfig) -> dict:
    """Measure the tokenizers, write the JSON, the plot and the sheet, and return the content of the JSON."""
    check_record_path(config.out)
    for name in ("tokenizer", "data"):
        if not getattr(config, name):
            raise ValueError(f"--{name} is needed (see --help)")
    model = LarpTokenizer.from_pretrained(config.tokenizer, device=config.device, variant=config.variant)
    others = [LarpTokenizer.from_pretrained(name, device=config.device) for name in config.compare]
    for name, other in zip(config.compare, others, strict=True):
        if other.config.clip_shape != model.config.clip_shape:
            raise ValueError(f"{name} is for clips {other.config.clip_shape}, {config.tokenizer} for {model.config.clip_shape}")  # fmt: skip
    lengths = lengths_of(config, model)
    rows, sheet = measure(config, model, others)
    pixels, size = math.prod(model.config.clip_shape), model.codebook_size
    report = {
        "curve": [point(rows[f"length {n}"], n, size, pixels) for n in lengths],
        "targets": [adaptive(target, np.asarray(rows[f"target {target}"]), size, pixels) for target in config.targets],
        "compare": [
            {"tokenizer": name, "nested": other.config.nested}
            | point(rows[f"other {k}"], other.num_tokens, other.codebook_size, pixels)
            for k, (name, other) in enumerate(zip(config.compare, others, strict=True))
        ],
        "mean_colour_psnr": float(np.mean([row[0] for row in rows["mean_colour"]])),
        "num_clips": len(rows["mean_colour"]),
        "checkpoint": model.weight_hash(),
        "versions": versions(),
        "config": to_dict(config),
    }
    write_json(config.out, report)
    plot(report, config.out.with_name(config.out.stem + "-curve.png"))
    if sheet:
        caption = "from above: original, then " + ", ".join(map(str, lengths)) + " codes"
        path = config.out.with_name(config.out.stem + "-clips.png")
        contact_sheet([np.concatenate(sheet, axis=2)], [caption], path, columns=2, cell=sheet[0].shape[1])
    return report


def plot(report: dict, path: Path) -> None:
    """Draw the curve and the tokenizers beside it, where matplotlib is installed."""
    if (pyplot := open_pyplot()) is None:
        return
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, key, style in (
        ("prefixes of one nested tokenizer", "curve", "o-"),
        ("tokenizers of a fixed number of codes", "compare", "s"),
    ):
        if report[key]:
            axes.plot([p["bits_per_clip"] for p in report[key]], [p["psnr"] for p in report[key]], style, label=name)
    axes.axhline(report["mean_colour_psnr"], color="grey", linestyle=":", label="each clip in its mean colour")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bits per clip")
    axes.set_ylabel("PSNR (dB)")
    axes.set_title(f"{report['num_clips']} clips", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def describe(report: dict) -> str:
    """Return the figures of a report as text to print."""
    lines = [f"{p['num_tokens']:>6} codes  {p['bits_per_clip']:8.0f} bits per clip  PSNR {p['psnr']:.2f} dB  SSIM {p['ssim']:.4f}" for p in report["curve"]]  # fmt: skip
    lines += [
        f"target {p['target_psnr']:g} dB: {p['num_tokens']:.1f} codes in the mean, reached by {p['reached']:.0%} of the clips "
        f"({p['num_tokens_for_all']} codes for every clip would reach it as often)"
        for p in report["targets"]
    ]
    lines += [f"{p['tokenizer']}: {p['num_tokens']} codes, PSNR {p['psnr']:.2f} dB, SSIM {p['ssim']:.4f}" for p in report["compare"]]  # fmt: skip
    return "\n".join([*lines, f"mean colour: PSNR {report['mean_colour_psnr']:.2f} dB, {report['num_clips']} clips"])


main = partial(run_evaluation, __file__, CurveConfig, evaluate, describe)

if __name__ == "__main__":
    run_script("rate_distortion.py", main)
