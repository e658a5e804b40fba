"""The whole way on the built-in captioned videos: tokenizer, tokens, language model, a video for a sentence, and its score.

    make quickstart            (or: python training/quickstart.py [--out runs/quickstart] [--prompt "..."])

Prints and runs the commands that a user would type. A stage that has finished is not run again: `make quickstart` after an
interruption goes on where it stopped. --fresh starts anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from larp.engine.signals import run_script

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a red circle moving left"


def main() -> None:
    """Run the stages, then print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="folder of the run (default: %(default)s)"
    )
    parser.add_argument("--prompt", default=PROMPT, help="what to generate at the end (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="start anew, removing what an earlier run left in --out")
    parser.add_argument("--tokenizer-options", default="", help="more options for train_tokenizer.py, in one string")
    parser.add_argument("--mllm-options", default="", help="more options for train_mllm.py, in one string")
    arguments = parser.parse_args()
    out = arguments.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another place with --out")
    if arguments.fresh and out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    stages = Stages(out)
    tokenizer, mllm = out / "tokenizer", out / "mllm"
    stages.run("tokenizer", [*launch("train_tokenizer.py", tokenizer), *shlex.split(arguments.tokenizer_options)])
    data = json.loads((tokenizer / "config.json").read_text())["data"]
    for split in ("train", "test"):
        options = [
            "--tokenizer",
            tokenizer / "model",
            "--data",
            data,
            "--split",
            split,
            "--out",
            out / f"tokens-{split}",
        ]
        stages.run(f"tokens_{split}", [sys.executable, ROOT / "training/extract_tokens.py", *options])
    options = [
        "--tokens",
        out / "tokens-train",
        "--eval-tokens",
        out / "tokens-test",
        "--tokenizer",
        tokenizer / "model",
    ]
    stages.run("language_model", [*launch("train_mllm.py", mllm), *options, *shlex.split(arguments.mllm_options)])
    video, sheet = out / "generated.mp4", out / "generated.png"
    stages.run("generate", [sys.executable, "-c", typed(arguments.prompt, mllm / "model", video, sheet)], always=True)
    scored = ["--model", mllm / "model", "--protocol", "shapes", "--out", out / "shapes.json"]
    stages.run("evaluation", [sys.executable, ROOT / "eval/mllm.py", *scored])
    report = summarise(out, stages)
    print(json.dumps(report, indent=2))
    print(
        f'\n"{arguments.prompt}":\n  video          {video}\n  contact sheet  {sheet}\n  report         {out / "report.json"}'
    )


def launch(script: str, out: Path) -> list:
    """The deepspeed command of a training script; `--resume` goes on with what an interrupted run left."""
    command = [
        Path(sys.executable).parent / "deepspeed",
        "--log_level",
        "error",
        ROOT / "training" / script,
        "--out",
        out,
    ]
    return [*command, "--resume"] if (out / "config.json").exists() else command


def typed(prompt: str, model: Path, video: Path, sheet: Path) -> str:
    """What a user would type in Python."""
    call = f"video = larp_mllm.generate({prompt!r}, model={str(model)!r})"
    return f"import larp_mllm; {call}; video.save({str(video)!r}, scale=8); video.save({str(sheet)!r})"


class Stages:
    """Runs commands one after the other, and records which succeeded and the seconds that each took."""

    def __init__(self, out: Path):
        self.file = out / "stages.json"
        self.seconds: dict[str, float] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def run(self, name: str, command: list, always: bool = False) -> None:
        """Run a stage unless it is done; if it fails, say how to go on and exit with its status."""
        if name in self.seconds and not always:
            print(f"== {name}: done before, in {self.seconds[name]:.0f} s")
            return
        words = [str(word) for word in command]
        print(f"== {name}: {shlex.join(words)}", flush=True)
        began = time.monotonic()
        status = subprocess.run(words, env=self.environment, check=False).returncode
        if status:
            print(f"== {name} ended with status {status}; mend what it says above and run the same command again: "
                  "finished stages are kept", file=sys.stderr)  # fmt: skip
            sys.exit(status if status > 0 else 1)
        self.seconds[name] = round(time.monotonic() - began, 1)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.seconds, indent=2) + "\n")
        part.replace(self.file)


def summarise(out: Path, stages: Stages) -> dict:
    """Write report.json: seconds of each stage and the figures of the chain."""
    tokenizer = json.loads((out / "tokenizer/report.json").read_text())
    scores = json.loads((out / "shapes.json").read_text())
    report = {"seconds": {**stages.seconds, "total": round(sum(stages.seconds.values()), 1)}}
    report |= {name: round(tokenizer[name], 4) for name in ("psnr", "mean_colour_psnr", "prior_top1", "codes_used")}
    report |= {name: scores[name] for name in ("colour_accuracy", "direction_accuracy", "shape_accuracy")}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    run_script("quickstart.py", main)
