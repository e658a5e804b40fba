"""First videos with the weights that come with the package; then the whole chain from scratch on the built-in captioned videos.

    make quickstart            (or: python training/quickstart.py [--out runs/quickstart] [--prompt "..."])

The chain is tokenizer, tokens, language model, a video for a sentence, and its score. Prints and runs the commands that a user
would type. A stage that has finished is not run again: `make quickstart` after an interruption goes on where it stopped.
--fresh starts anew.
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

from larp.engine.clock import check_minutes
from larp.engine.signals import run_script
from larp.metrics.protocols import checkpoint_hashes
from larp_mllm.locate import shipped

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a red circle moving left"
SHIPPED_PROMPTS = ("a person surfing", "a horse race", PROMPT)
SHIPPED_SCORE = Path("eval/results/shipped-shapes.json")
ACCURACIES = ("colour_accuracy", "direction_accuracy", "shape_accuracy")
# What each training gets of the time that is left; the rest is for what follows it, and for starts of processes.
TOKENIZER_SHARE, MLLM_SHARE = 0.62, 0.55


def main() -> None:
    """Run the stages, then print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="folder of the run (default: %(default)s)"
    )
    parser.add_argument("--prompt", default=PROMPT, help="what to generate at the end (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=7.0, help="length of the chain, about (default: %(default)s)")
    parser.add_argument(
        "--data", default="shapes:", help="the built-in videos; shapes:count=512 are fewer (default: %(default)s)"
    )
    parser.add_argument("--fresh", action="store_true", help="start anew, removing what an earlier run left in --out")
    arguments = parser.parse_args()
    check_minutes(arguments.minutes)
    out = arguments.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another place with --out")
    if arguments.fresh and out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    stages = Stages(out)
    show_shipped(out / "shipped", stages)
    train(out, arguments, stages)
    report(out, arguments.prompt, stages)


def show_shipped(folder: Path, stages: Stages) -> None:
    """Write videos for `SHIPPED_PROMPTS` with the language model that comes with the package, and print their paths."""
    code = (
        "import larp_mllm\nfrom larp.data.contact_sheet import Gallery\n"
        f"videos = larp_mllm.generate({list(SHIPPED_PROMPTS)}, model='tiny')\n"
        f"gallery = Gallery({str(folder)!r}, videos[0].fps)\n"
        "for video in videos: gallery.add(video.prompt, video.frames)\ngallery.write_sheet()"
    )
    stages.run("shipped", [sys.executable, "-c", code])
    print(f"with the weights that come with larp-mllm, in {stages.seconds['shipped']:.0f} s:")
    print(*(f"  {path}" for path in sorted(folder.iterdir())), sep="\n")
    print("Now everything from scratch. Ctrl-C leaves these files, and the same command goes on.", flush=True)


def train(out: Path, arguments: argparse.Namespace, stages: Stages) -> None:
    """Train the chain on the built-in videos, generate a video, and score the language model."""
    tokenizer, mllm, data = out / "tokenizer", out / "mllm", arguments.data
    code = f"from larp.data.datasets import open_videos; [open_videos({data!r}, split) for split in ('train', 'test')]"
    stages.run("videos", [sys.executable, "-c", code])
    minutes = stages.minutes_left(arguments.minutes) * TOKENIZER_SHARE
    options = ["--data", data, "--minutes", f"{minutes:.3f}"]
    stages.run("tokenizer", [*launch("train_tokenizer.py", tokenizer), *options])
    for split in ("train", "test"):
        options = ["--tokenizer", tokenizer / "model", "--data", data, "--split", split]
        command = [sys.executable, ROOT / "training/extract_tokens.py", *options, "--out", out / f"tokens-{split}"]
        stages.run(f"tokens_{split}", command)
    minutes = stages.minutes_left(arguments.minutes) * MLLM_SHARE
    tokens = ["--tokens", out / "tokens-train", "--eval-tokens", out / "tokens-test"]
    options = [*tokens, "--tokenizer", tokenizer / "model", "--minutes", f"{minutes:.3f}"]
    stages.run("language_model", [*launch("train_mllm.py", mllm), *options])
    code = typed(arguments.prompt, mllm / "model", out / "generated.mp4", out / "generated.png")
    stages.run("generate", [sys.executable, "-c", code], always=True)
    scored = ["--model", mllm / "model", "--protocol", "shapes", "--out", out / "shapes.json"]
    stages.run("evaluation", [sys.executable, ROOT / "eval/mllm.py", *scored])


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
        # Its model knows shapes alone: what `larp_mllm.generate` takes by default stays what it was.
        self.environment["LARP_MLLM_HOME"] = str(out.resolve())

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

    def minutes_left(self, minutes: float) -> float:
        """What the finished stages of the chain leave of its length; at least a sixth of it."""
        spent = sum(seconds for name, seconds in self.seconds.items() if name != "shipped")
        return max(minutes - spent / 60, minutes / 6)


def report(out: Path, prompt: str, stages: Stages) -> None:
    """Write report.json, with the seconds of each stage and the figures of the chain; print it, and all files."""
    tokenizer = json.loads((out / "tokenizer/report.json").read_text())
    scores = json.loads((out / "shapes.json").read_text())
    summary = {"seconds": {**stages.seconds, "total": round(sum(stages.seconds.values()), 1)}}
    summary |= {name: round(tokenizer[name], 4) for name in ("psnr", "mean_colour_psnr", "prior_top1", "codes_used")}
    summary |= {name: scores[name] for name in ACCURACIES}
    (out / "report.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    print(f"\n{scores['n']} videos for held-out prompts:")
    print(f"  trained here   {accuracies(scores)}   {out / 'shapes.json'}")
    known = json.loads((ROOT / SHIPPED_SCORE).read_text())
    if known["protocol"]["checkpoint"] == checkpoint_hashes(shipped("language-model")):
        print(f"  shipped model  {accuracies(known)}   {SHIPPED_SCORE}")
    else:
        print("  shipped model  not measured with these weights: python eval/mllm.py --model tiny --protocol shapes")
    files = {"video": "generated.mp4", "contact sheet": "generated.png", "scored videos": "shapes.png",
             "report": "report.json", "tokenizer": "tokenizer/model", "language model": "mllm/model"}  # fmt: skip
    print(f'"{prompt}":', *(f"  {name:<14} {out / file}" for name, file in files.items()), sep="\n")


def accuracies(scores: dict) -> str:
    """The score in a line."""
    return "  ".join(f"{name.removesuffix('_accuracy')} {scores[name]:6.1%}" for name in ACCURACIES)


if __name__ == "__main__":
    run_script("quickstart.py", main)
