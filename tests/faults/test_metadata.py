"""Damaged JSON of models, token caches and generators: every fault is one line, at any depth."""

import json
import random
import shutil

from larp.data.token_cache import TokenCache, TokenCacheError, shard_path
from larp.engine.generator_run import find_training
from larp.models.generator import LarpGenerator
from larp.models.tokenizer import LarpTokenizer
from larp_mllm.locate import shipped
from larp_mllm.pipeline import Mllm
from tests.faults.damage import damaged, places
from tests.larp_mllm.tiny import tiny_cache, tiny_mllm

import pytest
import torch
from safetensors.torch import load_file, save_file

VALUES = (..., None, "x", -1, 1.5, [], {}, 10**9, True, [[]], {"a": [None]})


def read_cache(folder):
    cache = TokenCache.open(folder)
    cache.load_tokenizer()
    cache.hold_out()


def read_generator(folder):
    LarpGenerator.from_pretrained(folder)
    find_training(str(folder))


def check_each(path, read, count):
    """Damage a file at `count` places and at the root; `read` works all the same, or raises an error of one line."""
    rng, whole, text = random.Random(0), json.loads(path.read_text()), path.read_text()
    inner = [where for where in places(whole) if where]
    refused = 0
    for where in [(), *rng.sample(inner, min(count, len(inner)))]:
        for new in rng.sample(VALUES, 2) if where else (None, [], 3):
            path.write_text(json.dumps(damaged(whole, where, new)))
            try:
                read()
            except (ValueError, OSError) as error:
                assert "\n" not in str(error), (path.name, where, new)
                refused += 1
    path.write_text(text)
    return refused


def test_a_damaged_token_cache_is_one_line(tmp_path):
    folder = tiny_cache(tmp_path)
    for path in folder.glob("*.json"):
        check_each(path, lambda: read_cache(folder), 8)
    shard = shard_path(folder, 0)
    tensors = load_file(shard)
    good = {"videos": json.dumps([[i, "a", None] for i in range(80)]), "skipped": "[]"}
    for notes in (
        None,
        {},
        good | {"videos": "[[1]]"},
        good | {"videos": "x"},
        good | {"videos": "3"},
        good | {"skipped": "[1]"},
    ):
        save_file(tensors, shard, notes)
        with pytest.raises(TokenCacheError) as error:
            TokenCache.open(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
    save_file(tensors | {"codes": torch.zeros(80, 3, dtype=torch.int16)}, shard, good)
    with pytest.raises(TokenCacheError, match="codes do not fit"):
        TokenCache.open(folder)


def test_a_damaged_generator_or_tokenizer_is_one_line(tmp_path):
    for part, read in (("generator", read_generator), ("tokenizer", LarpTokenizer.from_pretrained)):
        folder = tmp_path / part
        shutil.copytree(shipped(part), folder)
        for path in folder.glob("*.json"):
            assert check_each(path, lambda folder=folder, read=read: read(folder), 3)


def test_other_types_in_a_language_models_files_are_one_line(tmp_path):
    tiny_mllm().save(tmp_path)
    for name, where, new, words in (
        ("generation_config.json", (), [], "generation_config.json is damaged"),
        ("generation_config.json", ("pad_token_id",), {}, "generation_config.json is damaged"),
        ("training.json", (), {"captions": {"words": ["a", {}]}}, "training.json is damaged"),
        ("training.json", (), {"captions": [1]}, "training.json is damaged"),
        ("video_tokenizer/config.json", ("dtype",), [], "dtype is"),
    ):
        path = tmp_path / name
        before = path.read_text() if path.exists() else "{}"
        path.write_text(json.dumps(damaged(json.loads(before) | {"dtype": 0} if where else {}, where, new)))
        with pytest.raises(ValueError, match=words) as error:
            Mllm.load(tmp_path)
        assert "\n" not in str(error.value)
        path.write_text(before)


@pytest.mark.slow
def test_a_damaged_language_model_is_one_line(tmp_path):
    tiny_mllm().save(tmp_path)
    for path in sorted(tmp_path.rglob("*.json")):
        assert check_each(path, lambda: Mllm.load(tmp_path), 10)
