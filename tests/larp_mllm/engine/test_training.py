"""training/train_mllm.py on a cache of codes that follow from their captions."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import larp_mllm
from larp.config import from_dict, load_recipe
from larp.data import token_cache as token_files
from larp.data.token_cache import TokenCache, TokenCacheError
from larp.engine.backend import Ranks
from larp.engine.checkpoint import newest_state
from larp.engine.log import read_metrics as metrics
from larp_mllm.data.dataset import CaptionedVideos, Tasks, TrainingMix
from larp_mllm.engine import results, staged_run
from larp_mllm.engine.samples import SamplingConfig
from larp_mllm.engine.settings import TrainMllmConfig
from larp_mllm.generation.sampling import VideoSampling
from larp_mllm.locate import find_model
from larp_mllm.model.base_models import load_base
from larp_mllm.video import Video
from tests.larp_mllm.tiny import tiny_cache, tiny_video_tokenizer
from training import train_mllm
from training.train_mllm import RECIPES, default_recipe

import numpy as np
import pytest
import torch
from transformers import modeling_utils

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


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tiny_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def base(qwen, tmp_path_factory) -> Path:
    """A base that counts as pretrained."""
    folder = tmp_path_factory.mktemp("base")
    qwen.model.base.save_pretrained(folder)
    qwen.processor.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prose(tmp_path_factory) -> str:
    """A short text to judge on, which takes less time than the one that comes along."""
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text("The kettle was on the stove, and the rain kept falling.")
    return f"txt:{path}"


@pytest.fixture
def train(cache, prose):
    def run(out: Path, *options: str, tokens: Path | None = cache) -> dict:
        data = [] if tokens is None else ["--tokens", str(tokens)]
        return train_mllm.main([*data, "--out", str(out), "--eval-text", prose, *SMALL, *options])

    return run


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict:
    return larp_mllm.LarpMllmForCausalLM.from_pretrained(out / "model").state_dict()


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def stop_after(monkeypatch, steps: int) -> None:
    """Let a run be asked to stop after so many of its steps."""
    asked = iter(range(1, 1000))
    monkeypatch.setattr(train_mllm, "stop_requested", lambda: next(asked) >= steps)


def test_a_run_learns_and_leaves_a_model_that_generate_finds(train, tmp_path):
    options = ("--joint.steps", "60", "--joint.llm-lr", "3e-3", "--joint.adapter-lr", "3e-3", "--sampling.videos", "2")
    report = train(tmp_path / "run", *options)
    assert report["eval"]["video_accuracy"] > 0.9
    assert report["eval"]["video_bits"] < 2 < lines(tmp_path / "run")[0]["video_bits"]
    assert report == json.loads((tmp_path / "run/report.json").read_text())
    assert report == json.loads((tmp_path / "run/model/training.json").read_text())
    assert report["samples"] and all(Path(path).is_file() for path in report["samples"])
    assert find_model() == (tmp_path / "run/model").resolve()
    assert larp_mllm.generate("a red circle moving left", temperature=0).codes == (0, 1, 2, 3)


# ----------------------------------------------------------------------------------------------------------------- stages


def test_align_keeps_the_base_and_joint_adds_lora(base, train, qwen, tmp_path):
    report = train(tmp_path / "run", "--base", str(base), *STAGES)
    assert [(line["step"], line["stage"]) for line in lines(tmp_path / "run")] == [
        *((step, "align") for step in (1, 2, 3)),
        *((step, "joint") for step in (4, 5, 6, 7)),
    ]
    assert [stage["trained"] for stage in report["stages"]] == ["adapter", "lora"]
    assert "llm_lr" not in lines(tmp_path / "run")[0]
    assert lines(tmp_path / "run")[3]["llm_lr"] == pytest.approx(1e-4 / 2)  # in its warm-up
    before, after = qwen.model.base.state_dict(), weights(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[f"base.{name}"])}
    assert changed and all("proj" in name for name in changed)
    assert {name for name in after if "lora" in name} == set()


def test_align_alone_leaves_the_perplexity_of_text_as_it_was(base, train, qwen, tmp_path):
    report = train(tmp_path / "run", "--base", str(base), "--align.steps", "5", "--joint.steps", "0")
    before, after = qwen.model.base.state_dict(), weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[f"base.{name}"]) for name in before)
    text = report["text"]
    assert text["before"]["nll"] == text["after"]["nll"] > 0
    # The adapter has learned in the meantime, and with it what it gives to video_start.
    assert text["before"]["video_start"] != text["after"]["video_start"]


@pytest.mark.slow
def test_wherever_it_is_stopped_a_run_goes_on_to_the_same_weights(base, train, tmp_path, monkeypatch):
    options = ("--base", str(base), *STAGES)
    train(tmp_path / "whole", *options)
    stopped = []
    for steps in (1, 2, 2):  # in align, at its end, in joint
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            stopped.append(train(tmp_path / "cut", *options, *(["--resume"] if stopped else []))["stopped_at"])
    assert stopped == [1, 3, 5]
    report = train(tmp_path / "cut", *options, "--resume")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert [line["step"] for line in lines(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6, 7]
    assert all(stage["seconds"] > 0 for stage in report["stages"])
    with pytest.raises(ValueError, match="--resume"):
        train(tmp_path / "cut", *options)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["0", pytest.param("3", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (train_mllm, "train_step"),
        (staged_run, "save_adapter"),
        (staged_run, "load_adapter"),
        (results, "write_current"),
    ],
)
def test_wherever_it_is_killed_a_run_goes_on_to_the_same_weights(
    base, train, tmp_path, monkeypatch, module, name, zero
):
    """As by kill -9: nothing is saved on the way out, and the run goes on from its last checkpoint."""
    options = ("--base", str(base), *STAGES, "--engine.zero-stage", zero)
    train(tmp_path / "whole", *options)
    real = getattr(module, name)

    def dies(*arguments):
        # In training: after step 5 of 7, the checkpoints being those of steps 3 and 4.
        if name != "train_step" or len(lines(tmp_path / "cut")) >= 5:
            raise ZeroDivisionError
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, dies)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / "cut", *options)
    train(tmp_path / "cut", *options, "--resume")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.mark.slow
def test_sigterm_saves_and_another_process_goes_on(base, cache, prose, train, tmp_path):
    options = ["--base", str(base), "--align.steps", "20", "--joint.steps", "20", "--log-every", "1"]
    data = ["--tokens", str(cache), "--out", str(tmp_path / "cut"), "--eval-text", prose, *SMALL]
    command = [sys.executable, str(ROOT / "training/train_mllm.py"), *data, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    stopped = 0
    for upto in (5, 25):  # in align, in joint
        process = subprocess.Popen([*command, *(["--resume"] if stopped else [])], env=environment, cwd=tmp_path)
        while process.poll() is None and not (
            metrics(tmp_path / "cut") and metrics(tmp_path / "cut")[-1]["step"] >= upto
        ):
            time.sleep(0.02)
        process.terminate()
        assert process.wait(timeout=300) == 143
        assert newest_state(tmp_path / "cut").step > stopped
        stopped = newest_state(tmp_path / "cut").step
    assert 20 < stopped < 40
    train(tmp_path / "cut", *options, "--resume")
    train(tmp_path / "whole", *options)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_killed_after_the_last_step_a_run_repeats_nothing_and_ended_it_stays_as_it_is(
    train, tmp_path, monkeypatch, capsys
):
    options = ("--joint.steps", "3", "--save-every", "2", "--log-every", "10")
    train(tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        patch.setattr(results, "write_current", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / "cut", *options)
    monkeypatch.setattr(train_mllm, "train_step", lambda *_: pytest.fail("trained again"))
    report = train(tmp_path / "cut", *options, "--resume", "--joint.llm-lr", "7")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert lines(tmp_path / "cut")[-1]["step"] == 3
    # The rates are those that it was trained with.
    whole = json.loads((tmp_path / "whole/report.json").read_text())
    assert [{**stage, "seconds": 0} for stage in report["stages"]] == [{**s, "seconds": 0} for s in whole["stages"]]
    assert report["eval"] == whole["eval"] and report["resumed"][0]["step"] == report["steps"] == 3
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(train_mllm, "build", lambda *_: pytest.fail("loaded something"))
    assert train(tmp_path / "cut", *options, "--resume", "--joint.llm-lr", "9", "--adapter", "free") == report
    said = capsys.readouterr().out
    assert f"{tmp_path}/cut finished before, at step 3: nothing to do" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


@pytest.mark.slow
def test_the_report_tells_the_options_that_each_part_of_a_run_had(base, train, tmp_path, monkeypatch):
    def go(*options, steps=1000):
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            return train(tmp_path / "run", "--base", str(base), *STAGES, *options)

    go("--align.adapter-lr", "1e-3", steps=4)  # one step into joint
    go("--resume", "--joint.llm-lr", "5e-3", "--align.adapter-lr", "0.5", "--z-loss", "0.1", steps=1)
    report = go("--resume", "--align.adapter-lr", "1e-3")
    assert [stage["adapter_lr"] for stage in report["stages"]] == [1e-3, 5e-4]
    assert report["stages"][1]["llm_lr"] == 1e-4
    changed = {"joint.llm_lr": [None, 5e-3], "align.adapter_lr": [1e-3, 0.5], "z_loss": [0.0, 0.1]}
    assert report["resumed"] == [{"step": 4, "changed": changed}, {"step": 5, "changed": {}}]
    assert lines(tmp_path / "run")[4]["llm_lr"] > 1e-3 > lines(tmp_path / "run")[5]["llm_lr"], "as it was"


def test_asked_to_stop_at_the_last_step_a_run_ends_in_full(train, tmp_path, monkeypatch):
    stop_after(monkeypatch, 5)
    assert train(tmp_path / "run", "--joint.steps", "5")["steps"] == 5
    assert (tmp_path / "run" / "report.json").is_file()


def test_what_fails_after_training_does_not_lose_the_model(train, tmp_path, monkeypatch):
    for name in ("evaluate", "write_samples"):
        with monkeypatch.context() as patch:
            patch.setattr(results, name, lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                train(tmp_path / name, "--joint.steps", "2")
        assert find_model() == (tmp_path / name / "model").resolve()
        assert weights(tmp_path / name)
        assert json.loads((tmp_path / name / "model/training.json").read_text())["steps"] == 2


def test_a_model_that_is_no_number_is_written_but_not_the_one_that_generate_finds(train, tmp_path, monkeypatch):
    run = ("--joint.steps", "2", "--joint.warmup", "0")
    train(tmp_path / "good", *run)
    with pytest.raises(FloatingPointError, match=r"far/model is written, but of no use: its \S+ is not finite"):
        train(tmp_path / "far", *run, "--joint.llm-lr", "1e30", "--joint.adapter-lr", "1e30")
    real = results.write_current

    def poisoned(run, folder):
        run.mllm.model.base.get_input_embeddings().weight.data[5, 3] = math.nan
        real(run, folder)

    monkeypatch.setattr(results, "write_current", poisoned)
    with pytest.raises(FloatingPointError, match=r"its base\.model\.embed_tokens\.weight is not finite"):
        train(tmp_path / "poisoned", *run)
    assert find_model() == (tmp_path / "good/model").resolve()
    for name in ("far", "poisoned"):
        report = json.loads((tmp_path / name / "report.json").read_text(), parse_constant=pytest.fail)
        assert report["steps"] == 2 and (tmp_path / name / "model/model.safetensors").is_file()
    with pytest.raises(FloatingPointError, match="is not finite"):
        train(tmp_path / "good", *run, "--joint.steps", "3", "--resume")
    with pytest.raises(ValueError, match="no language model with video vocabulary was trained on this machine"):
        find_model()


@pytest.mark.slow
def test_another_model_is_not_resumed_and_the_difference_is_named(base, train, tmp_path, capsys):
    small = ("--joint.steps", "2")
    train(tmp_path / "run", *small)
    before = weights(tmp_path / "run")
    for tokens, options, words in (
        (tiny_cache(tmp_path, seed=7), (), "video_tokenizer was .{16}, is .{16}"),
        (None, ("--tiny.layers", "2"), "tiny.layers was 1, is 2"),
        (tiny_cache(tmp_path / "a", captions=["zebras"]), (), "text_tokenizer was .{16}, is .{16}"),
        (None, ("--align.steps", "2"), "stage was joint, is align"),
        (None, ("--adapter", "free"), "adapter was codebook, is free"),
    ):
        given = {} if tokens is None else {"tokens": tokens}
        with pytest.raises(ValueError, match=f"does not fit this run: .*{words}"):
            train(tmp_path / "run", *small, "--joint.steps", "3", "--resume", *options, **given)
    assert same(before, weights(tmp_path / "run"))
    assert not (tmp_path / "run/config.resumed.json").exists() and "going on" not in capsys.readouterr().out
    lora = ("--base", str(base), "--align.steps", "0", "--joint.steps", "2")
    train(tmp_path / "lora", *lora)
    with pytest.raises(ValueError, match="lora_rank was 2, is 4"):
        train(tmp_path / "lora", *lora, "--joint.steps", "3", "--joint.lora-rank", "4", "--resume")
    # The size of tiny bases means nothing here.
    train(tmp_path / "lora", *lora, "--joint.steps", "3", "--tiny.layers", "3", "--resume")


# ------------------------------------------------------------------------------------------------- what changes speed alone


class Recorder:
    """Stands in for an engine: gradients of the micro batches add up in the model, their losses are kept."""

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
    """One step on eight sequences: what train_step returns, the mean loss, and the gradients."""
    data = CaptionedVideos(TokenCache.open(cache), qwen.processor.layout, qwen.processor.encode_text, 1024)
    sequences = TrainingMix(Tasks(), data).batch(0, 8, 0)

    def run(rank: int = 0, world_size: int = 1, **options):
        config = from_dict(TrainMllmConfig, {"batch_size": 8, **options}, "options")
        recorder = Recorder(qwen.model, config.engine.accumulation)
        tally = train_mllm.train_step(recorder, sequences, config, Ranks(rank, world_size, rank))
        gradients = {name: p.grad.clone() for name, p in qwen.model.named_parameters() if p.grad is not None}
        return tally, sum(recorder.losses) / len(recorder.losses), gradients

    yield run
    qwen.model.zero_grad()


def test_packing_accumulation_and_ranks_change_nothing_but_speed(step):
    tally, loss, gradients = step()
    options = ({"sequence_length": 64}, {"engine": {"accumulation": 4}}, {"sequence_length": 30, "head_chunk": 5})
    for other, other_loss, other_gradients in (step(**values) for values in options):
        torch.testing.assert_close(other, tally, rtol=1e-5, atol=1e-5)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-3, atol=1e-6)
    halves = [step(rank, 2, sequence_length=64) for rank in (0, 1)]
    torch.testing.assert_close(halves[0][0] + halves[1][0], tally, rtol=1e-5, atol=1e-5)
    assert (halves[0][1] + halves[1][1]) / 2 == pytest.approx(loss, rel=1e-5)


def test_the_loss_is_the_mean_over_targets_with_the_weights_that_were_asked_for(step):
    tally, loss, _ = step()
    video_nll, _, videos, text_nll, _, texts = tally.tolist()
    assert loss == pytest.approx((video_nll + text_nll) / (videos + texts), rel=1e-5)
    assert step(text_weight=5.0)[1] == pytest.approx((video_nll + 5 * text_nll) / (videos + texts), rel=1e-5)
    assert step(z_loss=0.1)[1] > loss + 0.01 and torch.equal(step(z_loss=0.1)[0], tally)


@pytest.mark.slow
def test_accumulation_and_packing_train_to_the_same_losses(train, tmp_path):
    train(tmp_path / "one", "--joint.steps", "5")
    train(tmp_path / "four", "--joint.steps", "5", "--engine.accumulation", "4", "--sequence-length", "64")
    one, four = lines(tmp_path / "one")[-1], lines(tmp_path / "four")[-1]
    for name in ("video_bits", "text_nll", "grad_norm"):
        assert one[name] == pytest.approx(four[name], rel=1e-4)


@pytest.mark.slow
def test_checkpointed_activations_change_nothing(base, train, tmp_path, monkeypatch):
    recomputed = []
    real = modeling_utils.checkpoint
    monkeypatch.setattr(modeling_utils, "checkpoint", lambda *a, **k: recomputed.append(1) or real(*a, **k))
    options = ("--base", str(base), "--align.steps", "2", "--joint.steps", "2")
    train(tmp_path / "kept", *options)
    assert not recomputed
    train(tmp_path / "again", *options, "--engine.activation-checkpointing")
    assert recomputed and same(weights(tmp_path / "kept"), weights(tmp_path / "again"))


@pytest.mark.slow
def test_samples_on_the_way_change_nothing(base, train, tmp_path):
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
        # The loss does not depend on key biases (softmax), so their gradients are rounding noise, which Adam blows up.
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
        "64",
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


# ------------------------------------------------------------------------------------------------------------------- options


def test_free_rows_are_the_baseline_and_other_options_are_taken(train, tmp_path, monkeypatch):
    given = {}
    real = staged_run.load_base
    monkeypatch.setattr(staged_run, "load_base", lambda *a, **k: given.update(k) or real(*a, **k))
    options = (
        "--joint.steps",
        "3",
        "--adapter",
        "free",
        "--schedule",
        "constant",
        "--joint.warmup",
        "0",
        "--log-every",
        "1",
    )
    (tmp_path / "prose.txt").write_text("It rained all day.\n\n" * 5)
    judged = ("--eval-text", f"txt:{tmp_path}/prose.txt")
    report = train(tmp_path / "run", *options, *judged, "--eval-videos", "2", "--trust-remote-code")
    assert report["text"]["before"]["pieces"] == report["text"]["after"]["pieces"] == 2
    assert report["adapter"] == "free" and "adapter.code_input.rows.weight" in weights(tmp_path / "run")
    assert {line["adapter_lr"] for line in lines(tmp_path / "run")} == {2e-3}
    assert report["eval"]["videos"] == 2 and given["trust_remote_code"] is True
    assert SamplingConfig(guidance_scale=3.0, temperature=0.5).sampling(7) == VideoSampling(
        guidance_scale=3.0, temperature=0.5, seed=7
    )


@pytest.mark.slow
def test_bf16_trains_and_stays_float32(base, train, tmp_path):
    train(
        tmp_path / "run", "--base", str(base), "--align.steps", "2", "--joint.steps", "2", "--engine.precision", "bf16"
    )
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32}


def test_given_frames_and_rate_come_from_the_cache(train, tmp_path):
    folder = tiny_cache(tmp_path, key={"condition_frames": 2})
    shard = token_files.shard_path(folder, 0)
    columns, notes = token_files.read_shard(shard)
    given = {
        "conditions": columns["codes"].flip(1),
        "fps": torch.full((len(columns["codes"]),), 12.5, dtype=torch.float64),
    }
    token_files.write_shard(shard, {**columns, **given}, notes["videos"], notes["skipped"])
    report = train(
        tmp_path / "run", "--joint.steps", "2", "--tasks.continuation", "0.5", "--fps", "None", tokens=folder
    )
    config = larp_mllm.LarpMllmConfig.from_pretrained(tmp_path / "run/model")
    assert (config.given_frames, config.fps) == (2, 12.5)
    assert report["eval"].keys() >= {
        f"{task}_{what}" for task in ("video", "chat", "continuation") for what in ("bits", "accuracy")
    }
    assert report["tasks"]["continuation"] > 0
    report = train(tmp_path / "other", "--joint.steps", "2", "--tasks.continuation", "0", "--fps", "3", tokens=folder)
    config = larp_mllm.LarpMllmConfig.from_pretrained(tmp_path / "other/model")
    assert (config.given_frames, config.fps) == (0, 3.0)
    assert "continuation_bits" not in report["eval"]


@pytest.mark.slow
def test_records_and_text_are_mixed_in_and_judged_apart(train, tmp_path, capsys):
    frames = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    (tmp_path / "clips").mkdir()
    Video(frames, 8.0).save(tmp_path / "clips/a.mp4")
    asked = {"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}
    records = [{"text": f"look {number}: <video> noise", "videos": ["a.mp4"]} for number in range(10)]
    records += [{"messages": [asked, {"role": "assistant", "content": f"Noise {number}."}]} for number in range(10)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "prose.txt").write_text("\n\n".join("It rained all day. " * 20 + str(number) for number in range(40)))
    data = ("--records", str(tmp_path / "records.jsonl"), "--text", f"txt:{tmp_path}/prose.txt", "--joint.steps", "2")
    root = ("--data-root", str(tmp_path / "clips"))
    report = train(tmp_path / "all", *data, *root)
    assert set(report["tasks"]) == {"text_to_video", "video_to_text", "chat", "interleaved", "text"}
    assert report["data"]["records"] == {"trained_on": 19, "held_out": 1} and report["data"]["text_pieces"] == 40
    assert {"video_bits", "records_text_nll"} <= set(report["eval"])
    assert report["text"]["data"].endswith("prose.txt")  # of --eval-text
    (note,) = report["data"]["notes"]
    assert note.startswith("1 of 1 held-out records show a video that is trained on in another record")
    said = capsys.readouterr().out
    assert f"note: {note}" in said and f"of held-out text ({report['text']['data']})" in said
    # Without a token cache the tokenizer must be named; then the held-out text is a part of --text.
    alone = [*data, *root, "--tokenizer", str(tiny_video_tokenizer().save_pretrained(tmp_path / "tokenizer"))]
    report = train_mllm.main([*alone, "--out", str(tmp_path / "alone"), *SMALL, "--stride", "2"])
    assert larp_mllm.LarpMllmConfig.from_pretrained(tmp_path / "alone/model").frame_stride == 2
    assert set(report["tasks"]) == {"interleaved", "text"} and report["data"]["text_pieces"] == 38
    assert report["text"]["data"].startswith("one document in 20 of txt:") and "records_text_nll" in report["eval"]
    assert report["samples"] == []
    with pytest.raises(ValueError, match=r"records\.jsonl:1, video 1: .*a\.mp4"):
        train(tmp_path / "wrong", *data)
    (tmp_path / "clips/a.mp4").rename(tmp_path / "a.mp4")
    (tmp_path / "clips/a.mp4").symlink_to(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="outside"):
        train(tmp_path / "outside", *data, *root)
    assert train(tmp_path / "outside", *data, *root, "--allow-outside")["data"]["records"]


# -------------------------------------------------------------------------------------------------------------------- errors


def test_a_cache_of_another_tokenizer_is_refused(train, tmp_path):
    other = tiny_video_tokenizer(seed=7).save_pretrained(tmp_path / "other")
    with pytest.raises(TokenCacheError, match="tokenizer is"):
        train(tmp_path / "run", "--tokenizer", str(other))
    with pytest.raises(TokenCacheError, match="extract_tokens"):
        train(tmp_path / "run", tokens=tmp_path / "nothing")
    with pytest.raises(ValueError, match="same cache as tokens"):
        train(tmp_path / "run", "--eval-tokens", str(tiny_cache(tmp_path)), tokens=tmp_path / "cache")


def test_out_is_no_file(train, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(train_mllm, "open_token_caches", lambda *_: pytest.fail("loaded something first"))
    with pytest.raises(ValueError, match=r"file is a file: choose another place with --out"):
        train(tmp_path / "file")


def test_a_base_that_cannot_be_trained_is_refused_before_the_run_begins(base, train, tmp_path):
    model, tokenizer = load_base(str(base))
    model.model.norm.weight.data.fill_(3e38)  # finite, but nothing that comes of it
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "huge")
    with pytest.raises(ValueError, match=r"huge gives (nan|inf) nats per token of held-out text"):
        train(tmp_path / "run", "--base", str(tmp_path / "huge"), *STAGES)
    tokenizer.add_special_tokens({"eos_token": "<|over|>"})
    tokenizer.save_pretrained(tmp_path / "huge")
    with pytest.raises(ValueError, match=r"'<\|over\|>' \(\d+, eos_token\)"):
        train(tmp_path / "run", "--base", str(tmp_path / "huge"), *STAGES)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").glob("*.json*"))


@pytest.mark.slow
def test_of_two_processes_one_tells_what_is_wrong_with_a_record(cache, tmp_path):
    (tmp_path / "records.jsonl").write_text('{"text": "a <video>", "videos": ["absent.mp4"]}\n')
    data = ["--tokens", cache, "--records", tmp_path / "records.jsonl", "--out", tmp_path / "run", *SMALL]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [str(word) for word in (*launch, ROOT / "training/train_mllm.py", *data)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode != 0 and done.stderr.count("records.jsonl:1") == 1, done.stderr
    assert "train_mllm.py: " in done.stderr and "DistBackendError" not in done.stderr
    assert 'train_mllm.py", line' not in done.stderr, "no traceback of ours"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--joint.method", "lora"), "--joint.method full"),
        (("--joint.steps", "0", "--align.steps", "5"), "--joint.method full"),
        (("--joint.steps", "0"), "nothing to train"),
        (("--joint.warmup", "900"), "shorter than the stage"),
        (("--joint.llm-lr", "0"), "positive number"),
        (("--align.steps", "-1"), "or more"),
        (("--z-loss", "-1"), "0 or more"),
        (("--sampling.every", "-1"), "0 .none. or more"),
        (("--engine.precision", "fp16", "--engine.zero-stage", "2"), "use bf16"),
    ],
)
def test_options_that_cannot_work_end_with_a_message(train, tmp_path, capsys, options, words):
    with pytest.raises(SystemExit):
        train(tmp_path / "run", *options)
    assert re.search(words, " ".join(capsys.readouterr().err.replace("│", " ").split()))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--sequence-length", "16"), "longest sequence of --tokens has .* raise it"),
        (("--sequence-length", "4096"), "1024 positions"),
        (
            ("--tasks.text-to-video", "0", "--tasks.video-to-text", "0", "--tasks.chat", "0", "--tasks.text", "1"),
            "nothing to train on",
        ),
        (("--engine.accumulation", "3"), "multiple of 3"),
        (("--eval-text", "txt:nowhere.txt"), "nowhere.txt"),
    ],
)
def test_data_that_cannot_work_are_named(train, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        train(tmp_path / "run", *options)
    assert not (tmp_path / "run" / "config.json").exists()


def test_without_data_it_says_what_to_give(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TokenCacheError, match="runs/tokens holds no token cache: make one"):
        train(tmp_path / "run", tokens=None)
    with pytest.raises(ValueError, match="give --tokenizer"):
        train(tmp_path / "run", "--text", "txt:x.txt", tokens=None)


# ------------------------------------------------------------------------------------------------------------------- recipes


def test_every_recipe_is_a_config():
    for name in ("mllm-shapes32", "mllm-ucf64"):
        config = from_dict(TrainMllmConfig, load_recipe(name, RECIPES), name)
        assert (config.align.steps, config.joint.method) == (0, "full")


def test_pretrained_bases_do_not_get_the_rates_of_the_tiny_recipe():
    assert default_recipe([]) == default_recipe(["--base", "tiny-llama"]) == "mllm-shapes32"
    assert default_recipe(["--base", "Qwen2-0.5B"]) is default_recipe(["--base=Qwen2-0.5B"]) is None
    # What a pretrained base then gets: the adapter alone first, then LoRA.
    config = TrainMllmConfig()
    assert config.align.steps > 0 and config.joint.steps > 0 and config.joint.method == "lora"


# ---------------------------------------------------------------------------------------------------------------- minutes


def test_minutes_are_shared_out_to_the_stages(base, train, tmp_path, monkeypatch):
    options = (
        "--base",
        str(base),
        "--align.steps",
        "30",
        "--joint.steps",
        "70",
        "--minutes",
        "0.06",
        "--log-every",
        "1",
    )
    stop_after(monkeypatch, 3)
    stopped = train(tmp_path / "run", *options)
    assert stopped == {"stopped_at": 3} and newest_state(tmp_path / "run").loader_state["stage"] == "align"
    monkeypatch.undo()
    report = train(tmp_path / "run", *options, "--resume")
    told = lines(tmp_path / "run")
    assert [line["step"] for line in told] == list(range(1, report["steps"] + 1))
    last = {line["stage"]: line for line in told}
    assert [stage["steps"] for stage in report["stages"]] == [
        last["align"]["step"],
        last["joint"]["step"] - last["align"]["step"],
    ]
    assert 30 <= last["align"]["place"] < 60 and last["joint"]["place"] == 100 and last["joint"]["minutes"] >= 0.06
    assert last["joint"]["adapter_lr"] < 0.3 * max(line["adapter_lr"] for line in told if line["stage"] == "joint")
    again = train(tmp_path / "run", *options, "--resume")
    assert again["steps"] == report["steps"] and len(lines(tmp_path / "run")) == len(told), "nothing is left to do"


def test_a_run_in_minutes_that_is_stopped_in_its_second_stage_goes_on_there(base, train, tmp_path, monkeypatch):
    # The steps of the schedule say nothing of the stage: the second one begins at the third step or so.
    options = ("--base", str(base), "--align.steps", "1000", "--joint.steps", "1000", "--minutes", "0.04")
    entered = []
    own = staged_run.StagedRun.next_stage
    monkeypatch.setattr(staged_run.StagedRun, "next_stage", lambda run: (own(run), entered.append(1)))
    monkeypatch.setattr(train_mllm, "stop_requested", lambda: bool(entered))
    stopped = train(tmp_path / "run", *options)
    assert newest_state(tmp_path / "run").loader_state["stage"] == "joint" and "stopped_at" in stopped
    monkeypatch.undo()
    report = train(tmp_path / "run", *options, "--resume")
    assert report["steps"] > stopped["stopped_at"] and sum(s["steps"] for s in report["stages"]) == report["steps"]


def test_a_run_begins_with_trained_weights_of_the_same_shape(train, cache, tmp_path):
    train(tmp_path / "one", "--joint.steps", "2")
    still = ("--joint.steps", "1", "--joint.warmup", "0", "--joint.llm-lr", "1e-12", "--joint.adapter-lr", "1e-12")
    train(tmp_path / "two", *still, "--start-from", str(tmp_path / "one"))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    with pytest.raises(ValueError, match=r"start_from .* another model.*hidden_size was 32, is 64"):
        train(tmp_path / "three", *still, "--start-from", str(tmp_path / "one"), "--tiny.width", "64")
    assert not (tmp_path / "three").exists()
    with pytest.raises(ValueError, match=r"^--start-from .*gone: no model folder .* Give --start-from such a folder"):
        train(tmp_path / "three", *still, "--start-from", str(tmp_path / "gone"))
    shutil.rmtree(tmp_path / "one/model/video_tokenizer")
    with pytest.raises(ValueError, match=r"^--start-from .*one: .* lacks its video_tokenizer .*--unpack-results"):
        train(tmp_path / "three", *still, "--start-from", str(tmp_path / "one"))
