"""Options, recipes and errors of training/train_mllm.py."""

import json
import os
import re
import subprocess
import sys

from larp.config import from_dict, load_recipe
from larp_mllm.engine import staged_run
from larp_mllm.engine.samples import SamplingConfig
from larp_mllm.engine.settings import TrainMllmConfig
from larp_mllm.generation.sampling import VideoSampling
from larp_mllm.model.base_models import BaseError, load_base
from tests.larp_mllm.engine.runs import ROOT, SMALL, STAGES, lines, weights
from tests.larp_mllm.tiny import tiny_cache, tiny_video_tokenizer
from training import train_mllm
from training.train_mllm import RECIPES, default_recipe

import pytest
import torch


def test_free_rows_and_other_options(train, tmp_path, monkeypatch):
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
    held_out = ("--eval-text", f"txt:{tmp_path}/prose.txt")
    report = train(tmp_path / "run", *options, *held_out, "--eval-videos", "2", "--trust-remote-code")
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


def test_every_recipe_is_a_config():
    for name in ("mllm-shapes32", "mllm-shapes64", "mllm-ucf64"):
        config = from_dict(TrainMllmConfig, load_recipe(name, RECIPES), name)
        assert (config.align.steps, config.joint.method) == (0, "full")


def test_the_recipe_of_a_tiny_base_is_that_of_the_length_of_its_clips(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_recipe([]) == default_recipe(["--base", "tiny-llama"]) == "mllm-shapes64"
    assert default_recipe(["--tokens", "a"]) == default_recipe(["--tokenizer=b"]) == "mllm-shapes32"
    for codes, recipe in ((16, "mllm-shapes32"), (256, "mllm-shapes64")):
        (tmp_path / "runs/tokens").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs/tokens/index.json").write_text(json.dumps({"key": {"num_tokens": codes}}))
        assert default_recipe([]) == recipe


def test_a_base_that_cannot_be_had_is_said_before_tokens_are_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(train_mllm, "make_built_in_tokens", lambda *_: pytest.fail("tokens were made first"))
    with pytest.raises(BaseError, match="the hub cannot be reached"):
        train_mllm.make_tokens(TrainMllmConfig())


def test_pretrained_bases_do_not_get_the_rates_of_the_tiny_recipe():
    assert default_recipe(["--base", "Qwen2-0.5B"]) is default_recipe(["--base=Qwen2-0.5B"]) is None
    # A pretrained base gets the default stages: the adapter alone, then partial LoRA.
    config = TrainMllmConfig()
    assert config.align.steps > 0 and config.joint.steps > 0 and config.joint.method == "partial-lora"


def test_a_cache_of_another_tokenizer_is_refused(train, tmp_path):
    other = tiny_video_tokenizer(seed=7).save_pretrained(tmp_path / "other")
    with pytest.raises(match="tokenizer is"):
        train(tmp_path / "run", "--tokenizer", str(other))
    with pytest.raises(match="extract_tokens"):
        train(tmp_path / "run", tokens=tmp_path / "nothing")
    with pytest.raises(ValueError, match="same cache as tokens"):
        train(tmp_path / "run", "--eval-tokens", str(tiny_cache(tmp_path)), tokens=tmp_path / "cache")


def test_out_must_not_be_a_file(train, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(train_mllm, "open_token_caches", lambda *_: pytest.fail("loaded something first"))
    with pytest.raises(ValueError, match=r"file is a file: choose another place with --out"):
        train(tmp_path / "file")


def test_a_damaged_base_is_refused_before_the_run_begins(base, train, tmp_path):
    model, tokenizer = load_base(str(base))
    model.model.norm.weight.data.fill_(3e38)  # finite, but no activation is
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
def test_one_of_two_processes_reports_a_bad_record(cache, tmp_path):
    (tmp_path / "records.jsonl").write_text('{"text": "a <video>", "videos": ["absent.mp4"]}\n')
    data = ["--tokens", cache, "--records", tmp_path / "records.jsonl", "--out", tmp_path / "run", *SMALL]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [str(word) for word in (*launch, ROOT / "training/train_mllm.py", *data)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode != 0 and done.stderr.count("records.jsonl:1") == 1, done.stderr
    assert "train_mllm.py: " in done.stderr and "DistBackendError" not in done.stderr
    assert 'train_mllm.py", line' not in done.stderr, "no traceback"


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
        (("--tiny.heads", "0"), "tiny.heads must be a whole number of at least 1"),
        (("--sampling.every", "-1"), "0 .none. or more"),
        (("--engine.precision", "fp16", "--engine.zero-stage", "2"), "use bf16"),
    ],
)
def test_impossible_options_end_with_a_message(train, tmp_path, capsys, options, words):
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
def test_impossible_data_are_refused(train, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        train(tmp_path / "run", *options)
    assert not (tmp_path / "run" / "config.json").exists()


def test_text_without_a_tokenizer_is_refused(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="give --tokenizer"):
        train(tmp_path / "run", "--text", "txt:x.txt", tokens=None)
