"""Bases, and the errors of those that cannot be had."""

import time

from larp_mllm.bases import BaseError, load_base, tiny_tokenizer

import pytest


def test_unreachable_base_fails_within_seconds_and_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    started = time.monotonic()
    with pytest.raises(BaseError, match=r"--base Qwen2-0.5B: Qwen/Qwen2-0.5B cannot be loaded: .*tiny-qwen2"):
        load_base("Qwen2-0.5B")
    assert time.monotonic() - started < 10


def test_an_unknown_name_is_no_hub_name():
    with pytest.raises(BaseError, match="Qwen2-0,5B: no such folder"):
        load_base("Qwen2-0,5B")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(BaseError, match="cannot be loaded"):
        load_base(str(tmp_path))


def test_a_local_folder_is_a_base(qwen, tmp_path):
    qwen.model.base.save_pretrained(tmp_path)
    qwen.processor.text_tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_base(str(tmp_path))
    assert model.config.model_type == "qwen2"
    assert len(tokenizer) == len(qwen.processor.text_tokenizer)


def test_tiny_bases_take_their_size_from_the_options():
    model, _ = load_base("tiny-llama", ["a cat"], layers=3, width=16, heads=2)
    assert len(model.model.layers) == 3
    assert model.config.hidden_size == 16
    with pytest.raises(ValueError, match="multiple of 2"):
        load_base("tiny-llama", ["a cat"], width=15, heads=2)


def test_the_tiny_tokenizer_writes_any_text_and_is_reproducible():
    captions = ["a red circle moving left", "a blue square moving up"]
    tokenizer = tiny_tokenizer(captions)
    for text in (captions[0], "Ein Mann fährt Rad 🚲"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tiny_tokenizer(reversed(captions)).get_vocab() == tokenizer.get_vocab()
