"""`make quickstart` with a few steps in each stage: it ends with a video, a contact sheet and a report, and goes on where it stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_whole_way(tmp_path):
    out = tmp_path / "quick"
    tokenizer = "--data shapes:count=48 --steps 4 --save-every 2 --eval-clips 8 --optimizer.warmup 1"
    options = [
        "--tokenizer-options",
        tokenizer,
        "--mllm-options",
        "--joint.steps 3 --joint.warmup 1",
        "--prompt",
        "a blue square",
    ]
    command = [sys.executable, str(ROOT / "training/quickstart.py"), "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    figures = {"psnr", "prior_top1", "colour_accuracy", "direction_accuracy", "shape_accuracy"}
    assert figures <= set(report) and all(0 <= report[name] <= 100 for name in figures)
    assert {"tokenizer", "tokens_train", "language_model", "generate", "evaluation", "total"} <= set(report["seconds"])
    for name in ("generated.mp4", "generated.png", "report.json"):
        assert (out / name).stat().st_size > 0 and str(out / name) in done.stdout
    # A killed language-model stage: what was finished is kept.
    (out / "report.json").unlink()
    seconds = json.loads((out / "stages.json").read_text())
    del seconds["language_model"]
    (out / "stages.json").write_text(json.dumps(seconds))
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "tokenizer: done before" in again.stdout and (out / "report.json").exists()
