"""Measure the effect of the prior and of the stochastic quantizer, in one command:

    python eval/tokenizer_ablation.py --data ucf101:ROOT --seeds 0 1 2 --out tokenizer-ablation.json

Trains a tokenizer for each variant and seed, and a small AR generator of one recipe on the codes of each. Measures reconstruction,
codes, bits per clip and the Frechet distance of generated clips. The JSON is written after every training. The same command resumes
where it was stopped and skips the stages that finished.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from bench.jobs import check_options, check_seeds, stage
from larp.config import parse, to_dict
from larp.engine.signals import run_script
from larp.files import read_json, write_json
from larp.metrics.protocols import check_record_path

ROOT = Path(__file__).resolve().parents[1]
VARIANTS: dict[str, tuple[str, ...]] = {
    "larp": (),
    "no-prior": ("--model.prior.no-enabled",),
    "deterministic": ("--model.no-stochastic",),
    "no-prior-deterministic": ("--model.prior.no-enabled", "--model.no-stochastic"),
}
# Of the two evaluators' records and the two trainings' reports: where a figure lies, and what it is called here.
FIGURES = {
    "psnr": ("rfvd", "psnr"),
    "mean_colour_psnr": ("rfvd", "mean_colour_psnr"),
    "ssim": ("rfvd", "ssim"),
    "codes_used": ("rfvd", "codes_used"),
    "perplexity": ("rfvd", "perplexity"),
    "prior_top1": ("rfvd", "prior_top1"),
    "prior_top5": ("rfvd", "prior_top5"),
    "prior_bits": ("rfvd", "prior_bits"),
    "rfvd": ("rfvd", "frechet", "value"),
    "ar_bits_per_clip": ("generator", "bits_per_clip"),
    "ar_bits_per_token": ("generator", "bits_per_token"),
    "ar_top1": ("generator", "top1"),
    "gfvd": ("gfvd", "value"),
    "gfvd_floor": ("gfvd", "floor", "value"),
}


@dataclass(frozen=True)
class AblationConfig:
    """Train tokenizers that differ in one option; measure reconstruction and how well an AR model predicts their codes."""

    data: str = ""
    """Data spec of labelled videos with a train and a test split, as in training (needed)."""
    tokenizer_recipe: str = "tokenizer-ucf64"
    """Of training/train_tokenizer.py."""
    generator_recipe: str = "generator-ucf64"
    """Of training/train_generator.py; the fresh AR model."""
    variants: tuple[str, ...] = ("larp", "no-prior", "deterministic")
    """Among larp, no-prior, deterministic, no-prior-deterministic."""
    seeds: tuple[int, ...] = (0,)
    """One training of everything for each."""
    windows: int = 4
    """Clips of a training video at most, each also mirrored, for the AR model."""
    generator_steps: int = 300
    """Steps of the AR model; it keeps its best validation."""
    num_clips: int = 256
    """Generated clips of the Frechet distance; 0 leaves it out."""
    runs: Path = Path("runs/tokenizer-ablation")
    """Folder of the trainings."""
    out: Path = Path("tokenizer-ablation.json")
    """Where the figures go."""

    def __post_init__(self):
        check_seeds(self.seeds)
        for variant in self.variants:
            if variant not in VARIANTS:
                raise ValueError(f"unknown variant {variant!r}; the variants are {', '.join(VARIANTS)}")


def run_once(config: AblationConfig, variant: str, seed: int) -> dict[str, float]:
    """Train and measure one tokenizer; return its figures by name."""
    run = config.runs / f"{variant}-{seed}"
    own = {name: value for name, value in to_dict(config).items() if name not in ("variants", "seeds", "runs", "out")}
    check_options(run, [f"--{name}={value}" for name, value in own.items()])
    model, tokens = run / "tokenizer/model", {split: run / f"tokens-{split}" for split in ("train", "test")}
    common = ["--tokenizer", model, "--data", config.data]
    # What the tokenizer reaches is measured by ucf_rfvd.py, on all clips.
    stage(run / "tokenizer/report.json", ROOT / "training/train_tokenizer.py", "--recipe", config.tokenizer_recipe, "--data", config.data,
          "--eval-clips", 16, "--seed", seed, "--out", run / "tokenizer", *VARIANTS[variant], resumes=True)  # fmt: skip
    stage(run / "rfvd.json", ROOT / "eval/ucf_rfvd.py", *common, "--split", "test", "--out", run / "rfvd.json")
    windows = {"train": ["--windows", config.windows, "--flips"], "test": ["--windows", 2]}
    for split, folder in tokens.items():
        stage(
            folder / "index.json",
            ROOT / "training/extract_tokens.py",
            *common,
            "--split",
            split,
            *windows[split],
            "--out",
            folder,
        )
    stage(run / "generator/report.json", ROOT / "training/train_generator.py", "--task", "class", "--recipe", config.generator_recipe,
          "--tokens", tokens["train"], "--eval-tokens", tokens["test"], "--steps", config.generator_steps, "--seed", seed,
          "--sampling.clips", 0, "--out", run / "generator", resumes=True)  # fmt: skip
    if config.num_clips:
        stage(run / "gfvd.json", ROOT / "eval/ucf_gfvd.py", "--generator", run / "generator/model", *common,
              "--num-clips", config.num_clips, "--out", run / "gfvd.json")  # fmt: skip
    records = {name: run / f"{name}.json" for name in ("rfvd", "gfvd")} | {"generator": run / "generator/report.json"}
    read = {name: read_json(path, "delete it, and run again") for name, path in records.items() if path.exists()}
    found = {name: dig(read, keys) for name, keys in FIGURES.items()}
    return {name: value for name, value in found.items() if value is not None}


def dig(records: dict, keys: tuple[str, ...]) -> float | None:
    """Follow `keys` into nested records; None where the way ends."""
    for key in keys:
        if not isinstance(records, dict) or key not in records:
            return None
        records = records[key]
    return records


def summarise(rows: list[dict]) -> dict[str, dict]:
    """Mean, standard deviation over the seeds (absent for one seed) and number of seeds of every figure of every variant."""
    summary: dict[str, dict] = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        alike = [row["figures"] for row in rows if row["variant"] == variant]
        names = [name for name in FIGURES if all(name in figures for figures in alike)]
        summary[variant] = {"seeds": len(alike)}
        for name in names:
            values = [figures[name] for figures in alike]
            deviation = {"deviation": stdev(values)} if len(values) > 1 else {}
            summary[variant][name] = {"mean": mean(values)} | deviation
    return summary


def describe(summary: dict[str, dict]) -> str:
    """The summary as a table for a person."""
    shown = ("psnr", "perplexity", "prior_top1", "ar_bits_per_clip", "ar_top1", "gfvd")
    lines = [f"{'':24}" + "".join(f"{name:>22}" for name in shown)]
    for variant, figures in summary.items():
        cells = []
        for name in shown:
            value = figures.get(name)
            deviation = f" +- {value['deviation']:.3g}" if value and "deviation" in value else ""
            cells.append(f"{value['mean']:.4g}{deviation}" if value else "-")
        lines.append(f"{variant:24}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    """Run the command line `argv` (by default the program's own) and return the record; ValueError for mistakes of the user."""
    config, _ = parse(
        AblationConfig, sys.argv[1:] if argv is None else argv, ROOT / "eval/recipes", "tokenizer_ablation.py"
    )
    if not config.data:
        raise ValueError("--data is needed (see --help)")
    check_record_path(config.out)
    rows: list[dict] = []
    report: dict = {}
    # Seeds outermost: a run that is cut short still compares the variants.
    for seed in config.seeds:
        for variant in config.variants:
            rows.append({"variant": variant, "seed": seed, "figures": run_once(config, variant, seed)})
            summary = summarise(rows)
            report = {"summary": summary, "runs": rows, "options": {name: list(VARIANTS[name]) for name in summary},
                      "config": to_dict(config)}  # fmt: skip
            write_json(config.out, report)
            print(describe(summary), flush=True)
    return report


if __name__ == "__main__":
    run_script("tokenizer_ablation.py", main)
