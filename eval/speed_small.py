"""Speed of a small tokenizer on a CPU, in one command on an idle machine:

    python eval/speed_small.py --out small.json

A training as its recipe runs it (bfloat16 where the processor multiplies it, a process for each core) beside the same in one float32
process, and encode and decode of the shipped tokenizer with bfloat16 weights beside float32. Both sides alternate.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bench.machine import describe_machine, machine
from bench.timing import MIN_PAIRS, Lap, alternate, describe_ratios, ratios, summary
from larp.config import parse, to_dict
from larp.engine.log import read_metrics
from larp.engine.signals import run_script
from larp.files import write_json
from larp.metrics.protocols import check_record_path
from larp.models.tokenizer import LarpTokenizer
from larp_mllm.locate import shipped

import torch

ROOT = Path(__file__).resolve().parents[1]
# Steps between two lines of the log, and steps of the run whose time is that of starting and ending.
_LOG_EVERY, _SHORT = 5, 20
_ONE_PROCESS = ("--engine.precision", "fp32", "--engine.processes", "1")


@dataclass(frozen=True)
class SmallSpeedConfig:
    """Time a small training as its recipe runs it beside one float32 process, and bfloat16 weights beside float32."""

    recipe: str = "tokenizer-shapes32"
    """Of training/train_tokenizer.py."""
    data: str = "shapes:count=256"
    """Training videos."""
    steps: int = 100
    """Steps that are timed in each run."""
    clips: int = 8
    """Clips at a time of encode and decode."""
    pairs: int = MIN_PAIRS
    """Runs of each of the two trainings, and laps of encode and decode."""
    out: Path = Path("small.json")
    """Where the record goes, written again after each kind of measurement."""

    def __post_init__(self):
        for name, least in (("steps", 4 * _LOG_EVERY), ("clips", 1), ("pairs", MIN_PAIRS)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


def run(config: SmallSpeedConfig, options: tuple[str, ...], steps: int) -> tuple[float, float]:
    """Train for so many steps; return the median wall time of a step after the first ones, and the CPU time of all processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "training/train_tokenizer.py", "--recipe", config.recipe]
        command += ["--data", config.data, "--continuous", "0", "--steps", str(steps), "--optimizer.warmup", "5"]
        command += ["--log-every", str(_LOG_EVERY), "--eval-clips", "4", "--out", f"{folder}/run", *options]
        before = _cpu_of_children()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise ValueError(f"the training ended with status {ended.returncode}: {ended.stderr[-2000:]}")
        times = [
            line["time"] for line in read_metrics(f"{folder}/run") if line["step"] % _LOG_EVERY == 0 and "loss" in line
        ]
    intervals = [(after - first) / _LOG_EVERY for first, after in pairwise(times[1:])]
    return median(intervals), _cpu_of_children() - before


def step_of(config: SmallSpeedConfig, options: tuple[str, ...]) -> Lap:
    """Time a step: wall time, and the CPU time of all processes together without start and end."""
    _, ends = run(config, options, _SHORT)
    wall, whole = run(config, options, _SHORT + config.steps)
    return Lap(wall, (whole - ends) / config.steps)


def training(config: SmallSpeedConfig) -> dict[str, Any]:
    """Time steps of both trainings, alternating. Ratios are of the recipe over one float32 process."""
    laps: dict[str, list[Lap]] = {"recipe": [], "one float32 process": []}
    for _ in range(config.pairs):
        laps["recipe"].append(step_of(config, ()))
        laps["one float32 process"].append(step_of(config, _ONE_PROCESS))
    return {**{name: summary(own) for name, own in laps.items()}, **ratios(*laps.values())}


def bf16_weights(config: SmallSpeedConfig) -> dict[str, Any]:
    """Time encode and decode of the shipped tokenizer with bfloat16 and float32 weights on one thread, alternating."""
    torch.set_num_threads(1)
    ways = [LarpTokenizer.from_pretrained(shipped("tokenizer"), dtype=dtype) for dtype in ("bfloat16", "float32")]
    shape = ways[0].config.clip_shape
    clips = torch.rand(config.clips, 3, *shape, generator=torch.Generator().manual_seed(0))
    works = [lambda model=model: model.decode(model.encode(clips)) for model in ways]
    alternate(works, 1, torch.device("cpu"))
    laps = alternate(works, config.pairs, torch.device("cpu"))
    return {**{name: summary(own) for name, own in zip(("bf16", "fp32"), laps, strict=True)}, **ratios(*laps)}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the command line `argv` (by default the program's own) and return the record; ValueError for mistakes of the user."""
    config, _ = parse(
        SmallSpeedConfig, sys.argv[1:] if argv is None else argv, ROOT / "training/recipes", "speed_small.py"
    )
    check_record_path(config.out)
    report: dict[str, Any] = {"machine": machine("cpu"), "config": to_dict(config)}
    print(describe_machine(report["machine"]))
    for name, measure in (("encode+decode", bf16_weights), ("training step", training)):
        report[name] = measure(config)
        report["machine"]["load_average_after"] = machine("cpu")["load_average"]
        write_json(config.out, report)
        ways = {way: own for way, own in report[name].items() if "all_seconds" in own}
        times = ", ".join(f"{way} {1e3 * own['seconds']:.0f} ms, {1e3 * own['cpu_seconds']:.0f} CPU ms" for way, own in ways.items())  # fmt: skip
        found = report[name]["time_ratio"]["median"]
        ratio = describe_ratios({**report[name], "ours": next(iter(ways.values()))})
        print(f"{name}: {times}; {ratio}; {1 / found:.2f} times as fast")
    print(config.out)
    return report


def _cpu_of_children() -> float:
    """CPU time in seconds of all processes below this one that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    run_script("speed_small.py", main)
