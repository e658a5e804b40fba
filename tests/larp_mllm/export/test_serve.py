"""What a server does with an export: its `generate` keeps videos whole, its chat template is that of training, and a request gives a video."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import larp_mllm
from larp.data.video import probe
from larp_mllm.cli import main
from larp_mllm.export.checkpoint import export
from larp_mllm.export.custom_generate import VideoSpans, generate
from larp_mllm.generation.logits_processors import SpanRules
from tests.larp_mllm.export.test_checkpoint import make

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.utils.import_utils import is_serve_available


def test_the_rules_are_those_of_larp_mllm(qwen):
    v = qwen.model.vocabulary
    span = v.span([0, 5, 5, 15])
    rows = [span[:length] for length in range(1, 7)] + [[1, 2, 3], [*span, 4], [4, *span[:2]], [*span, *span[:3]]]
    for row in rows:
        ids, scores = torch.tensor([row]), torch.randn(1, v.size)
        ours = SpanRules(v)(ids, scores)
        assert torch.equal(VideoSpans(v.video_start, v.tokens_per_video)(ids, scores), ours)


def test_generate_of_an_export_writes_whole_videos(tmp_path, monkeypatch):
    mllm = make(tmp_path)
    folder, v = export(mllm, tmp_path / "out"), mllm.model.vocabulary
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert stock.generation_config.do_sample and "generate" not in vars(stock)
    prompt = torch.tensor([[5, 6, v.video_start], [5, 6, 7]])
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 60, "eos_token_id": None}
    options["sequence_bias"] = {(v.video_start,): 6.0}
    torch.manual_seed(1)
    generated = generate(prompt, model=stock, **options)
    assert (generated == v.video_start).sum() > 4
    for row in generated.tolist():
        last = len(row) - 1 - row[::-1].index(v.video_start)
        v.split(row[:last] if len(row) - last < v.tokens_per_video + 2 else row)  # ValueError unless all are whole
    torch.manual_seed(1)
    with pytest.raises(ValueError, match=r"outside a video span|does not hold"):
        v.split(stock.generate(prompt, **options)[1].tolist())
    trusted = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(1)
    assert torch.equal(trusted.generate(prompt, **options), generated)


@pytest.mark.parametrize("text", ["qwen2", "qwen2_chat", "smollm", "llama3"])
def test_a_server_gives_the_ids_of_a_chat_as_in_training(text, tmp_path):
    mllm = make(tmp_path, "llama3-untied" if text == "llama3" else "qwen2-tied", text)
    folder = export(mllm, tmp_path / "out")
    loader = json.loads((folder / "larp.json").read_text())["tokenizer_class"]
    tokenizer = getattr(transformers, loader).from_pretrained(folder)
    messages = [{"role": "user", "content": "Show me a video: a person surfing"}]
    for chat in (messages, [*messages, {"role": "assistant", "content": "No."}, *messages]):
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids == mllm.processor.apply_chat_template(chat, add_generation_prompt=True)
    # An answer keeps the tokens of videos, and loses what ends it.
    answer = mllm.processor.encode_text("Here") + mllm.model.vocabulary.span([0, 1, 2, 3])
    said = tokenizer.parse_response([*answer, tokenizer.eos_token_id], prefix=tokenizer.decode(ids))["content"]
    assert said.strip() == tokenizer.decode(answer).strip() and said.endswith("<|code_3|><|video_end|>")


@contextmanager
def served(folder: Path, environment: dict[str, str]):
    """`transformers serve` on a free port of this machine; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", ".", "--trust-remote-code"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(folder.parent / "log.txt", "w") as log:
        server = subprocess.Popen(command, cwd=folder, env=os.environ | environment, stdout=log, stderr=log)
    try:
        for _ in range(600):
            assert server.poll() is None, (folder.parent / "log.txt").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.mark.slow
@pytest.mark.skipif(not is_serve_available(), reason="needs transformers[serving]")
def test_a_server_answers_with_a_video(tmp_path):
    """The request of the README of an export, to the model that ships, without a network."""
    folder = export(Path(larp_mllm.__file__).parent / "shipped/language-model", tmp_path / "out")
    (request,) = re.findall(r"-d ('.*?')", (folder / "README.md").read_text(), flags=re.S)
    body = json.loads(shlex.split(request)[0])
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    with served(folder, environment) as address:

        def ask(body: dict) -> bytes:
            headers = {"Content-Type": "application/json"}
            url = f"http://{address}/v1/chat/completions"
            post = urllib.request.Request(url, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(post, timeout=300) as reply:
                return reply.read()

        reply = ask(body | {"seed": 1})
        said = json.loads(reply)["choices"][0]["message"]["content"]
        question = {"role": "user", "content": f"{said} What is it?"}
        described = json.loads(ask({"model": ".", "messages": [question], "temperature": 0}))
    assert said.count("<|code_") == 256 and said.endswith("<|video_end|>")
    (tmp_path / "reply.json").write_bytes(reply)
    main(["decode-tokens", str(folder), str(tmp_path / "reply.json"), "-o", str(tmp_path / "surfing.mp4")])
    assert probe(tmp_path / "surfing.mp4").frames == 16
    assert "surfing" in described["choices"][0]["message"]["content"]
