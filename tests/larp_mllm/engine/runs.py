"""What the tests of training/train_mllm.py share: options of tiny runs, and what a run left in its folder."""

import json
from pathlib import Path

import larp_mllm
from training import train_mllm

import torch

ROOT = Path(__file__).resolve().parents[3]
SMALL = [
    "--tiny.layers=1",
    "--tiny.width=32",
    "--tiny.heads=2",
    "--batch-size=16",
    "--joint.warmup=1",
    "--joint.lora-rank=2",
    "--sampling.videos=0",
    "--log-every=5",
]
STAGES = ("--align.steps", "3", "--joint.steps", "4", "--save-every", "2", "--log-every", "1")


def lines(out: Path) -> list[dict]:
    """Return the lines of a run's metrics."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict:
    """Return the state dict of a run's model."""
    return larp_mllm.LarpMllmForCausalLM.from_pretrained(out / "model").state_dict()


def same(one: dict, other: dict) -> bool:
    """Whether two state dicts are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def stop_after(monkeypatch, steps: int) -> None:
    """Ask a run to stop after a number of steps."""
    asked = iter(range(1, 1000))
    monkeypatch.setattr(train_mllm, "stop_requested", lambda: next(asked) >= steps)
