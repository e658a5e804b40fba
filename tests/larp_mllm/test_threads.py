"""Several threads use one process: the first call, which imports and loads, and later ones."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from larp.kernels.threads import threads
from larp.models.tokenizer import LarpTokenizer
from larp_mllm.api import open_model
from larp_mllm.model.weights import quiet
from larp_mllm.pipeline import Mllm
from tests.larp_mllm.tiny import colourful_mllm

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parents[2]
# Which functions a thread calls; the video of `describe` and `continue_video` is one that is generated without a model.
PROCESS = """
import hashlib, json, sys, threading
import larp_mllm, numpy as np, torch

count, model = int(sys.argv[1]), sys.argv[2]
frames = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), dtype=np.uint8)


def state():
    from transformers import PreTrainedModel
    from transformers.utils import logging
    patched = [torch.nn.init, torch.nn.modules.linear.init, torch.nn.modules.conv.init, PreTrainedModel]
    names = [f"{function.__module__}.{function.__qualname__}" for place in patched
             for name, function in sorted(vars(place).items()) if "init" in name or name.endswith("_")
             if hasattr(function, "__qualname__")]
    return [str(torch.get_default_dtype()), torch.get_num_threads(), logging.get_verbosity(), names,
            logging.is_progress_bar_enabled(), "DS_ACCELERATOR" in __import__("os").environ]


def call(seed):
    kind, options = seed % 4, {"model": model, "seed": seed}
    if kind == 0:
        return hashlib.sha256(larp_mllm.generate("a person surfing", **options).frames.tobytes()).hexdigest()
    if kind == 1:
        return larp_mllm.describe(frames, temperature=1.0, **options)
    if kind == 2:
        messages = [{"role": "user", "content": "a red circle"}]
        return str(larp_mllm.chat(messages, text_temperature=1.0, max_new_tokens=8, max_videos=1, **options)["content"])
    return hashlib.sha256(larp_mllm.generate("a red circle", 2, **options)[1].frames.tobytes()).hexdigest()


def at_once():
    found, ready = {}, threading.Barrier(count)

    def work(seed):
        ready.wait()
        try:
            found[seed] = call(seed)
        except BaseException as error:
            found[seed] = f"{type(error).__name__}: {error}"

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(count)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    return [found[seed] for seed in range(count)]


before = torch.get_num_threads()
cold, after = at_once(), state()
serial = [call(seed) for seed in range(count)]
print(json.dumps({"cold": cold, "warm": at_once(), "serial": serial, "after": after, "end": state(), "before": before}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4, 8])
def test_threads_get_the_results_of_a_process_without_them_and_change_nothing_global(count, tmp_path):
    colourful_mllm().save(tmp_path / "model")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    environment.pop("DS_ACCELERATOR", None)  # a test before may have set it in this process
    command = [sys.executable, "-c", PROCESS, str(count), str(tmp_path / "model")]
    found = json.loads(subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout)
    assert found["cold"] == found["warm"] == found["serial"]
    assert found["after"] == found["end"]
    dtype, kernel_threads, verbosity, functions, bars, accelerator = found["end"]
    assert (dtype, kernel_threads, bars, accelerator) == ("torch.float32", found["before"], True, False)
    assert verbosity == 30, "transformers' default"
    assert not [name for name in functions if "empty_func" in name or name.startswith("transformers.initialization")]


def test_threads_that_ask_for_one_model_at_a_time_load_it_once(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "larp_mllm"}')
    loads, found = [], []

    def load(folder, device, dtype):
        loads.append(folder)
        time.sleep(0.05)
        return object()

    monkeypatch.setattr(Mllm, "load", load)
    workers = [threading.Thread(target=lambda: found.append(open_model(tmp_path))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(loads) == 1 and len(found) == 4 and len(set(map(id, found))) == 1


def test_what_transformers_sets_while_it_loads_is_set_by_one_thread_at_a_time(qwen, tmp_path):
    """A tokenizer that another thread builds meanwhile has weights of the default type."""
    half, dtypes = threading.Event(), []

    def transformers_loads():
        with quiet():
            torch.set_default_dtype(torch.bfloat16)
            half.set()
            time.sleep(0.1)
            torch.set_default_dtype(torch.float32)

    saved = qwen.processor.video_tokenizer.save_pretrained(tmp_path / "tokenizer")
    other = threading.Thread(target=transformers_loads)
    other.start()
    half.wait()
    dtypes = {p.dtype for p in LarpTokenizer.from_pretrained(saved).parameters()}
    other.join()
    assert dtypes == {torch.float32}


def test_a_load_that_fails_leaves_torch_and_transformers_as_they_were(qwen, tmp_path):
    qwen.save(tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights.pop(next(name for name in weights if "norm" in name))
    save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
    before = (torch.get_default_dtype(), torch.nn.init.normal_, PreTrainedModel.init_weights, torch.get_num_threads())
    with pytest.raises(ValueError, match=r"norm.* is missing"):
        Mllm.load(tmp_path / "model", dtype="bfloat16")
    after = (torch.get_default_dtype(), torch.nn.init.normal_, PreTrainedModel.init_weights, torch.get_num_threads())
    assert after == before


def test_blocks_of_several_threads_leave_the_number_of_torchs_threads_as_it_was():
    first, second, ends = threading.Event(), threading.Event(), []
    outside = torch.get_num_threads()

    def other():
        first.wait()
        with threads(1):  # begins while the first block is open, and ends after it
            second.set()
            done.wait()
        ends.append(torch.get_num_threads())

    done = threading.Event()
    torch.set_num_threads(3)
    worker = threading.Thread(target=other)
    worker.start()
    try:
        with threads(1):
            first.set()
            second.wait()
        done.set()
        worker.join()
        fresh = threading.Thread(target=lambda: ends.append(torch.get_num_threads()))
        fresh.start()
        fresh.join()
        assert (torch.get_num_threads(), *ends) == (3, 3, 3)
    finally:
        torch.set_num_threads(outside)
