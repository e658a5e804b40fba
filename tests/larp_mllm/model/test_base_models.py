"""Base models: loading, tiny ones, and the errors of those that cannot be used."""

import json
import time
import urllib.error
from pathlib import Path

from larp.metrics.weights import SMOLLM2
from larp_mllm.locate import is_hub_name
from larp_mllm.model.base_models import (
    ALIASES,
    BaseError,
    check_at_hand,
    check_positions,
    check_rows,
    load_base,
    tiny_tokenizer,
)

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PhiConfig, PhiForCausalLM


def test_an_unreachable_base_fails_within_seconds_and_names_those_that_can_be_had(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LARP_CACHE", str(tmp_path))
    started = time.monotonic()
    unreachable = (
        r"--base Qwen2-0.5B: Qwen/Qwen2-0.5B is not on this machine, and the hub cannot be reached \(OSError: HF_HUB.*"
    )
    for load in (load_base, check_at_hand):
        with pytest.raises(
            BaseError, match=rf"{unreachable}after `larp-mllm fetch smollm2`.*a folder.*tiny-qwen2"
        ) as raised:
            load("Qwen2-0.5B")
        assert "\n" not in str(raised.value)
    assert time.monotonic() - started < 10
    SMOLLM2.converted.touch()
    with pytest.raises(BaseError, match=rf"{unreachable}SmolLM2-135M-Instruct \(which is fetched\)"):
        check_at_hand("Qwen2-0.5B")


def test_a_hub_that_cannot_be_resolved_is_one_that_cannot_be_reached(monkeypatch):
    def urlopen(request, timeout):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(BaseError, match=r"the hub cannot be reached \(URLError: .*Name or service not known"):
        check_at_hand("Qwen2-0.5B")


def test_bases_at_hand(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LARP_CACHE", str(tmp_path))
    check_at_hand("tiny-qwen2")
    check_at_hand(str(tmp_path))
    with pytest.raises(BaseError, match="SmolLM2-135M-Instruct is not on this machine"):
        check_at_hand("SmolLM2-135M-Instruct")
    SMOLLM2.converted.touch()
    check_at_hand("SmolLM2-135M-Instruct")


def test_an_unknown_name_is_no_hub_name():
    with pytest.raises(BaseError, match="Qwen2-0,5B: no such folder"):
        load_base("Qwen2-0,5B")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(BaseError, match="cannot be loaded"):
        load_base(str(tmp_path))


def test_a_local_folder_is_a_base(qwen, tmp_path):
    qwen.model.base.save_pretrained(tmp_path)
    qwen.processor.tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_base(str(tmp_path))
    assert model.config.model_type == "qwen2"
    assert len(tokenizer) == len(qwen.processor.tokenizer)


def test_tiny_bases_take_their_size_from_the_options():
    model, _ = load_base("tiny-llama", ["a cat"], layers=3, width=16, heads=2)
    assert len(model.model.layers) == 3
    assert model.config.hidden_size == 16
    with pytest.raises(ValueError, match="multiple of 2"):
        load_base("tiny-llama", ["a cat"], width=15, heads=2)


def test_the_tiny_tokenizer_encodes_any_text_and_is_reproducible():
    captions = ["a red circle moving left", "a blue square moving up"]
    tokenizer = tiny_tokenizer(captions)
    for text in (captions[0], "Ein Mann fährt Rad 🚲"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tiny_tokenizer(reversed(captions)).get_vocab() == tokenizer.get_vocab()


@pytest.fixture
def base(qwen, tmp_path):
    """A folder with a base, saved by transformers."""
    qwen.model.base.save_pretrained(tmp_path / "base")
    qwen.processor.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def change(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_a_base_is_loaded_in_another_dtype(base):
    assert load_base(str(base))[0].dtype == torch.float32
    assert load_base(str(base), dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert load_base("tiny-llama", ["a cat"], 1, 16, 2, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_pickled_weights_are_never_read(base):
    class Attack:
        def __reduce__(self):
            return Path.touch, (base / "ran",)

    (base / "model.safetensors").unlink()
    for name in ("model.pth", "pytorch_model.bin"):
        torch.save({"model.embed_tokens.weight": Attack()}, base / name)
        with pytest.raises(BaseError, match=rf"weights are pickled \({name}\).*convert it to safetensors"):
            load_base(str(base))
        assert not (base / "ran").exists()
        (base / name).unlink()


def test_a_base_without_its_text_tokenizer_is_refused(base):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (base / file).unlink()
    with pytest.raises(BaseError, match=r"text tokenizer"):
        load_base(str(base))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"architectures": ["Qwen2ForTokenClassification"]}, "is a Qwen2ForTokenClassification, needed is a causal"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "is a BertForMaskedLM, needed is a causal"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "a t5 is an encoder-decoder"),
    ],
)
def test_a_base_of_another_architecture_is_refused(base, fields, words):
    change(base, **fields)
    with pytest.raises(BaseError, match=words):
        load_base(str(base))


def test_a_model_with_video_vocabulary_and_its_run_are_no_bases(qwen, tmp_path):
    qwen.save(tmp_path / "model")
    for folder in (tmp_path, tmp_path / "model"):
        with pytest.raises(BaseError, match=r"has a video vocabulary already, and cannot be a base again: .*--resume"):
            load_base(str(folder))


def test_a_base_whose_head_has_a_bias_is_refused(base, tmp_path):
    config = PhiConfig(vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    PhiForCausalLM(config).save_pretrained(tmp_path / "phi")
    load_base(str(base))[1].save_pretrained(tmp_path / "phi")
    with pytest.raises(BaseError, match="the head of a phi has a bias"):
        load_base(str(tmp_path / "phi"))


def test_a_base_with_too_few_positions_for_a_video_is_refused():
    model, _ = load_base("tiny-llama", ["a cat"], 1, 16, 2)
    check_positions(model, 1021, "tiny-llama")
    with pytest.raises(
        BaseError, match=r"--base tiny-llama: it has 1024 positions, a video of this tokenizer takes 1024"
    ):
        check_positions(model, 1022, "tiny-llama")


def test_an_error_suggests_the_nearest_alias():
    with pytest.raises(BaseError, match=r"Qwen2-05B: no such folder.*did you mean Qwen2-0.5B\? Give") as refused:
        load_base("Qwen2-05B")
    assert sum(alias in str(refused.value) for alias in ALIASES) <= 4  # not the whole list
    with pytest.raises(BaseError, match=r"or alias\. Give"):
        load_base("something else")


def test_a_file_is_no_base(tmp_path):
    (tmp_path / "base").write_text("")
    with pytest.raises(BaseError, match="that is a file, not a folder"):
        load_base(str(tmp_path / "base"))


def rewrite(folder, change) -> None:
    """Change the weights in a base's folder."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def rename(weights):
    weights["model.norm.wait"] = weights.pop("model.norm.weight")


def widen(weights):
    weights["model.norm.weight"] = torch.ones(33)


def poison(weights):
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")


@pytest.mark.parametrize(
    "damage, words",
    [
        (rename, r"model\.norm\.weight is missing \(and model\.norm\.wait of its files is unknown to the model\)"),
        (widen, r"model\.norm\.weight has shape \(33,\) in place of \(32,\)"),
        (poison, r"its tensor model\.layers\.1\.mlp\.down_proj\.weight holds NaN or infinity"),
    ],
)
def test_missing_and_damaged_weights_are_named_not_initialised_at_random(base, damage, words):
    assert "lm_head.weight" not in load_file(base / "model.safetensors")  # tied: not missing
    load_base(str(base))
    rewrite(base, damage)
    with pytest.raises(BaseError, match=words):
        load_base(str(base))


def test_a_missing_shard_is_named(base):
    weights = load_file(base / "model.safetensors")
    names = {name: f"model-0000{1 + ('layers.1' in name)}-of-00002.safetensors" for name in weights}
    for file in set(names.values()):
        save_file({n: w for n, w in weights.items() if names[n] == file}, base / file, metadata={"format": "pt"})
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    load_base(str(base))
    (base / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BaseError, match=r"model-00002-of-00002\.safetensors|layers\.1\..* is missing"):
        load_base(str(base))


def test_control_tokens_without_a_row_are_named(base):
    model, tokenizer = load_base(str(base))
    check_rows(model, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    rows = model.get_input_embeddings().num_embeddings
    with pytest.raises(
        BaseError, match=rf"--base B: its embedding has {rows} rows, too few for '<\|turn\|>' \({rows}, chat"
    ):
        check_rows(model, tokenizer, "B")
    tokenizer.chat_template = None  # then nothing inserts it
    check_rows(model, tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|over|>"})
    with pytest.raises(BaseError, match=r"'<\|over\|>' \(\d+, eos_token\).*resize_token_embeddings"):
        check_rows(model, tokenizer, "B")
    model.resize_token_embeddings(len(tokenizer))
    check_rows(model, tokenizer)


@pytest.mark.parametrize("error, words", [(404, "HTTP Error 404"), (401, "HTTP Error 401")])
def test_errors_name_the_answer_of_the_hub(monkeypatch, error, words):
    def urlopen(request, timeout):
        raise urllib.error.HTTPError(request.full_url, error, "no", {}, None)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(BaseError, match=rf"--base Qwen/Qwen2-0.6B: .* cannot be loaded: HTTPError: {words}"):
        load_base("Qwen/Qwen2-0.6B")


def test_aliases_are_hub_names_of_each_family():
    assert all(is_hub_name(name) for name in ALIASES.values())
    for family in ("Qwen2-", "Qwen2.5-", "Qwen3-", "Llama-2-", "Llama-3", "Mistral-", "SmolLM-", "SmolLM2-"):
        assert any(alias.startswith(family) for alias in ALIASES)
