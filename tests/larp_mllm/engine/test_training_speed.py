"""Options of training/train_mllm.py that change only speed and memory: packing, accumulation, ranks, ZeRO stages."""

import json
import os
import subprocess
import sys

from larp.config import from_dict
from larp.data.token_cache import TokenCache
from larp.engine.backend import Ranks
from larp_mllm.data.dataset import CaptionedVideos, Tasks, TrainingMix
from larp_mllm.engine.settings import TrainMllmConfig
from tests.larp_mllm.engine.runs import ROOT, SMALL, STAGES, lines, same, weights
from training import train_mllm

import pytest
import torch
from transformers import modeling_utils


class Recorder:
    """Stands in for an engine: sums the gradients of micro batches in the model and records their losses."""

    def __init__(self, model, accumulation: int):
        self.model, self.accumulation, self.losses = model, accumulation, []
        model.zero_grad()

    def __call__(self, **inputs):
        return self.model(**inputs)

    def backward(self, loss):
        (loss / self.accumulation).backward()
        self.losses.append(loss.item())

    def step(self):
        pass


@pytest.fixture
def step(qwen, cache):
    """Runs one step on eight sequences: returns the sums of train_step, the mean loss, and the gradients."""
    data = CaptionedVideos(TokenCache.open(cache), qwen.processor.layout, qwen.processor.encode_text, 1024)
    sequences = TrainingMix(Tasks(), data).batch(0, 8, 0)

    def run(rank: int = 0, world_size: int = 1, **options):
        config = from_dict(TrainMllmConfig, {"batch_size": 8, **options}, "options")
        recorder = Recorder(qwen.model, config.engine.accumulation)
        sums = train_mllm.train_step(recorder, sequences, config, Ranks(rank, world_size, rank))
        gradients = {name: p.grad.clone() for name, p in qwen.model.named_parameters() if p.grad is not None}
        return sums, sum(recorder.losses) / len(recorder.losses), gradients

    yield run
    qwen.model.zero_grad()


def test_packing_accumulation_and_ranks_do_not_change_the_gradients(step):
    sums, loss, gradients = step()
    options = ({"sequence_length": 64}, {"engine": {"accumulation": 4}}, {"sequence_length": 30, "head_chunk": 5})
    for other, other_loss, other_gradients in (step(**values) for values in options):
        torch.testing.assert_close(other, sums, rtol=1e-5, atol=1e-5)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-3, atol=1e-6)
    halves = [step(rank, 2, sequence_length=64) for rank in (0, 1)]
    torch.testing.assert_close(halves[0][0] + halves[1][0], sums, rtol=1e-5, atol=1e-5)
    assert (halves[0][1] + halves[1][1]) / 2 == pytest.approx(loss, rel=1e-5)


def test_the_loss_is_the_weighted_mean_over_targets(step):
    sums, loss, _ = step()
    video_nll, _, videos, text_nll, _, texts = sums.tolist()
    assert loss == pytest.approx((video_nll + text_nll) / (videos + texts), rel=1e-5)
    assert step(text_weight=5.0)[1] == pytest.approx((video_nll + 5 * text_nll) / (videos + texts), rel=1e-5)
    assert step(z_loss=0.1)[1] > loss + 0.01 and torch.equal(step(z_loss=0.1)[0], sums)


@pytest.mark.slow
def test_accumulation_and_packing_train_to_the_same_losses(train, tmp_path):
    train(tmp_path / "one", "--joint.steps", "5")
    train(tmp_path / "four", "--joint.steps", "5", "--engine.accumulation", "4", "--sequence-length", "96")
    one, four = lines(tmp_path / "one")[-1], lines(tmp_path / "four")[-1]
    for name in ("video_bits", "text_nll", "grad_norm"):
        assert one[name] == pytest.approx(four[name], rel=1e-4)


@pytest.mark.slow
def test_checkpointed_activations_do_not_change_the_weights(base, train, tmp_path, monkeypatch):
    recomputed = []
    real = modeling_utils.checkpoint
    monkeypatch.setattr(modeling_utils, "checkpoint", lambda *a, **k: recomputed.append(1) or real(*a, **k))
    options = ("--base", str(base), "--align.steps", "2", "--joint.steps", "2")
    train(tmp_path / "stored", *options)
    assert not recomputed
    train(tmp_path / "again", *options, "--engine.activation-checkpointing")
    assert recomputed and same(weights(tmp_path / "stored"), weights(tmp_path / "again"))


@pytest.mark.slow
def test_samples_during_training_do_not_change_the_weights(base, train, tmp_path):
    train(tmp_path / "without", "--base", str(base), *STAGES)
    train(tmp_path / "with", "--base", str(base), *STAGES, "--sampling.every", "2", "--sampling.videos", "1")
    assert same(weights(tmp_path / "without"), weights(tmp_path / "with"))
    shown = sorted(path.name for path in (tmp_path / "with/samples").glob("step-*"))
    assert shown == ["step-00000002", "step-00000004", "step-00000006"]
    (caption,) = json.loads((tmp_path / "with/samples/step-00000006/captions.json").read_text())
    assert caption["captions"] == ["a green triangle moving down slowly"] and caption["video"] == "video19"
    assert isinstance(caption["described"], str)
    assert (tmp_path / "with/samples/step-00000006/sheet.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", [pytest.param("1", marks=pytest.mark.long), pytest.param("2", marks=pytest.mark.long), "3"]
)
def test_zero_stages_train_to_the_same_losses(base, train, tmp_path, stage):
    options = ("--base", str(base), "--align.steps", "3", "--joint.steps", "3", "--sampling.every", "2")
    for method in ("lora", "full"):
        run = (*options, "--joint.method", method, "--sampling.videos", "1")
        train(tmp_path / f"{method}-0", *run)
        train(tmp_path / f"{method}-{stage}", *run, "--engine.zero-stage", stage)
        plain, sharded = lines(tmp_path / f"{method}-0")[-1], lines(tmp_path / f"{method}-{stage}")[-1]
        assert plain["video_bits"] == pytest.approx(sharded["video_bits"], rel=1e-4)
        whole, gathered = weights(tmp_path / f"{method}-0"), weights(tmp_path / f"{method}-{stage}")
        # The loss does not depend on key biases (softmax), so their gradients are rounding noise, which Adam amplifies.
        for name in (name for name in whole if not name.endswith("k_proj.bias")):
            torch.testing.assert_close(gathered[name], whole[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", [pytest.param("0", marks=pytest.mark.long), "2", pytest.param("3", marks=pytest.mark.long)]
)
def test_two_processes_train_to_the_losses_of_one(base, cache, prose, train, tmp_path, stage):
    options = [
        "--base",
        str(base),
        *STAGES,
        "--sequence-length",
        "96",
        "--sampling.every",
        "3",
        "--sampling.videos",
        "1",
    ]
    train(tmp_path / "one", *options)
    data = ["--tokens", str(cache), "--out", str(tmp_path / "two"), "--eval-text", prose, *SMALL]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(ROOT / "training/train_mllm.py"), *data, *options, "--engine.zero-stage", stage]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = lines(tmp_path / "one")[-1], lines(tmp_path / "two")[-1]
    for name in ("video_bits", "text_nll"):
        assert one[name] == pytest.approx(two[name], rel=1e-4)
    whole, gathered = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in (name for name in whole if not name.endswith("k_proj.bias")):
        torch.testing.assert_close(gathered[name], whole[name], rtol=1e-3, atol=2e-4)
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    assert reports[0]["eval"] == pytest.approx(reports[1]["eval"], rel=1e-3)
