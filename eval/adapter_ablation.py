"""Compare video rows made from the codebook with free rows, in one command:

    python eval/adapter_ablation.py --tokens runs/ucf/tokens-train --eval-tokens runs/ucf/tokens-test --seeds 0 1 2 --steps 300

Trains language models with both adapters (--adapter codebook, free) for the same steps, seeds and batches. Reports metrics on
held-out clips, their paired differences, and the bits per code during training, with a plot; with --data also the Frechet distance
of the videos that each generates for class names. The same command resumes a training that was stopped and skips those that finished.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench.jobs import check_options, check_seeds, stage
from bench.plots import open_pyplot
from larp.config import parse, to_dict
from larp.data.token_cache import TokenCache
from larp.engine.log import read_metrics
from larp.engine.signals import run_script
from larp.files import read_json, write_json
from larp.metrics.protocols import check_record_path, versions
from larp_mllm.generation.sampling import VideoSampling

ROOT = Path(__file__).resolve().parents[1]
ADAPTERS = ("codebook", "free")
FIGURES = "figures.json"
# Figures of training/train_mllm.py on held-out clips, and how a person reads them.
SHOWN = {
    "video_bits": "bits per code, text-to-video",
    "video_accuracy": "likeliest code right",
    "continuation_bits": "bits per code, continuation",
    "text_nll": "nats per caption token",
    "gfvd": "Frechet distance of videos",
}


@dataclass(frozen=True)
class AdapterConfig:
    """Train language models that differ in their video rows alone, and measure them on held-out clips."""

    tokens: Path | None = None
    """Token cache to train on (needed)."""
    eval_tokens: Path | None = None
    """Token cache of held-out clips (needed)."""
    tokenizer: str | None = None
    """The LARP tokenizer of both; by default the one that the cache names."""
    mllm_recipe: str = "mllm-ucf64"
    """Of training/train_mllm.py."""
    base: str | None = None
    """The language model; by default that of the recipe."""
    steps: int = 300
    """Of the stage joint, in which the language model learns as well; 0 leaves it out."""
    align_steps: int | None = None
    """Of the stage align, in which the adapter learns alone; by default as the recipe says."""
    seeds: tuple[int, ...] = (0,)
    """One pair of trainings for each."""
    data: str = ""
    """Data spec of labelled videos; with it, `num_clips` videos of the test split's classes are generated and compared with real ones."""
    num_clips: int = 202
    """Of that distance."""
    log_every: int = 10
    """Steps of training that one point of the curve stands for."""
    runs: Path = Path("runs/adapter-ablation")
    """Folder of the trainings."""
    out: Path = Path("adapter-ablation.json")
    """Where the figures go; the plot gets the same name with -curve.png."""

    def __post_init__(self):
        check_seeds(self.seeds)
        if self.steps < 0 or (self.align_steps or 0) < 0 or self.log_every < 1:
            raise ValueError(
                f"steps={self.steps} and align_steps={self.align_steps} must be at least 0, log_every={self.log_every} at least 1"
            )


def options_of(config: AdapterConfig, adapter: str, seed: int) -> list[str]:
    """The command line of one training, but for its folder."""
    given = {
        "--recipe": config.mllm_recipe,
        "--base": config.base,
        "--tokens": config.tokens,
        "--eval-tokens": config.eval_tokens,
        "--tokenizer": config.tokenizer,
        "--align.steps": config.align_steps,
        "--joint.steps": config.steps,
        "--log-every": config.log_every,
        "--sampling.videos": 0,
        "--adapter": adapter,
        "--seed": seed,
    }
    return [str(word) for pair in given.items() if pair[1] is not None for word in pair]


def run_once(config: AdapterConfig, adapter: str, seed: int) -> dict[str, Any]:
    """Train and measure one language model, unless that was done: {"figures", "curve", "parameters"}.

    ValueError if the folder holds a training with other options.
    """
    run, options = config.runs / f"{adapter}-{seed}", options_of(config, adapter, seed)
    check_options(run, options)
    if not (run / FIGURES).is_file():
        # None of these is the model that larp_mllm.generate should take from now on.
        own = {"LARP_MLLM_HOME": str(config.runs.resolve() / "home")}
        script = ROOT / "training/train_mllm.py"
        stage(run / FIGURES, script, *options, "--out", run, resumes=True, environment=own)
        write_json(run / FIGURES, read_run(run))
    found = read_json(run / FIGURES, "delete it, and run again")
    if config.data:
        record = run / f"gfvd-{config.num_clips}.json"
        stage(record, ROOT / "eval/ucf_gfvd.py", "--mllm", run, "--data", config.data, "--split", "test",
              "--num-clips", config.num_clips, "--guidance-scale", VideoSampling().guidance_scale, "--out", record)  # fmt: skip
        found["figures"]["gfvd"] = read_json(record, "delete it, and run again")["value"]
    return found


def read_run(run: Path) -> dict[str, Any]:
    """What a finished training says: its figures on held-out clips, and [step, bits per code] of its batches on the way."""
    report = read_json(run / "report.json", "delete the folder, and run again")
    lines = [line for line in read_metrics(run) if line.get("video_bits") is not None]
    return {
        "figures": {name: report["eval"][name] for name in SHOWN if name in report["eval"]},
        "curve": [[line["step"], line["video_bits"]] for line in lines],
        "parameters": report["stages"][-1]["parameters"],
    }


def mean_and_deviation(values: list[float]) -> dict[str, float]:
    """Mean, and standard deviation where there is more than one value."""
    return {"mean": mean(values)} | ({"deviation": stdev(values)} if len(values) > 1 else {})


def summarise(runs: list[dict]) -> dict[str, Any]:
    """Over the seeds that both adapters were trained with: figures and curve of each, and the differences, codebook - free.

    runs: {"adapter", "seed", "figures", "curve"} each.
    """
    found = {(run["adapter"], run["seed"]): run for run in runs}
    seeds = [seed for adapter, seed in found if adapter == ADAPTERS[0] and (ADAPTERS[1], seed) in found]
    summary: dict[str, Any] = {"seeds": seeds, "codebook_minus_free": {}}
    for adapter in ADAPTERS if seeds else ():
        alike = [found[adapter, seed] for seed in seeds]
        names = [name for name in SHOWN if all(name in run["figures"] for run in alike)]
        points = zip(*(run["curve"] for run in alike), strict=False)
        summary[adapter] = {
            "figures": {name: mean_and_deviation([run["figures"][name] for run in alike]) for name in names},
            "curve": [[same[0][0], mean(bits for _, bits in same)] for same in points],
        }
    for name in summary[ADAPTERS[0]]["figures"] if seeds else ():
        pairs = [[found[adapter, seed]["figures"][name] for adapter in ADAPTERS] for seed in seeds]
        each = [codebook - free for codebook, free in pairs]
        summary["codebook_minus_free"][name] = mean_and_deviation(each) | {"by_seed": each}
    return summary


def plot(summary: dict[str, Any], path: Path) -> bool:
    """Draw the curves; False, and no file, without matplotlib."""
    if (pyplot := open_pyplot()) is None:
        return False
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for adapter, words in zip(ADAPTERS, ("rows from the codebook", "free rows"), strict=True):
        axes.plot(*zip(*summary[adapter]["curve"], strict=True), label=words)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per code, training batches")
    axes.set_title(f"mean of {len(summary['seeds'])} seeds", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def describe(summary: dict[str, Any]) -> str:
    """The summary as a table for a person."""
    if not summary["seeds"]:
        return "no seed with both adapters yet"

    def cell(value: dict, form: str = "") -> str:
        return format(value["mean"], form + ".4f") + (f" +- {value['deviation']:.4f}" if "deviation" in value else "")

    lines = [f"{'held-out clips':30}{'codebook':>20}{'free':>20}{'codebook - free':>22}"]
    for name, difference in summary["codebook_minus_free"].items():
        cells = "".join(f"{cell(summary[adapter]['figures'][name]):>20}" for adapter in ADAPTERS)
        lines.append(f"{SHOWN[name]:30}{cells}{cell(difference, '+'):>22}")
    return "\n".join([*lines, f"seeds: {', '.join(map(str, summary['seeds']))}; +- is the deviation over them"])


def main(argv: list[str] | None = None) -> dict:
    """Run the command line `argv` (by default the program's own) and return the record; ValueError for mistakes of the user."""
    argv = sys.argv[1:] if argv is None else argv
    config, _ = parse(AdapterConfig, argv, ROOT / "eval/recipes", "adapter_ablation.py")
    for name in ("tokens", "eval_tokens"):
        if getattr(config, name) is None:
            raise ValueError(f"--{name.replace('_', '-')} is needed (see --help)")
    check_record_path(config.out)
    key = TokenCache.open(config.tokens).key
    held_out = TokenCache.open(config.eval_tokens, {"tokenizer": key["tokenizer"]})
    runs: list[dict] = []
    report: dict[str, Any] = {}
    # Seeds outermost: a run that is cut short still compares the adapters.
    for seed in config.seeds:
        for adapter in ADAPTERS:
            runs.append({"adapter": adapter, "seed": seed} | run_once(config, adapter, seed))
            summary = summarise(runs)
            report = {
                "summary": summary,
                "runs": runs,
                "tokens": {"train": key, "held_out": held_out.key, "held_out_clips": len(held_out)},
                "versions": versions(),
                "config": to_dict(config),
                "files": [],
            }
            write_json(config.out, report)
            print(describe(summary), flush=True)
    curve = config.out.with_name(config.out.stem + "-curve.png")
    if plot(report["summary"], curve):
        report["files"] = [str(curve)]
        write_json(config.out, report)
    print("\n".join(report["files"] or ["no plot: pip install 'larp-mllm[plots]'"]))
    print(config.out)
    return report


if __name__ == "__main__":
    run_script("adapter_ablation.py", main)
