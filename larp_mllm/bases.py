"""Base language models: a hub name, an alias, a folder, or a tiny one made here that needs no network."""

import os
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

ALIASES = {
    "Qwen2-0.5B": "Qwen/Qwen2-0.5B",
    "Qwen2-1.5B": "Qwen/Qwen2-1.5B",
    "Qwen2.5-0.5B": "Qwen/Qwen2.5-0.5B",
    "Qwen2.5-1.5B": "Qwen/Qwen2.5-1.5B",
    "Qwen2.5-3B": "Qwen/Qwen2.5-3B",
    "Qwen3-0.6B": "Qwen/Qwen3-0.6B-Base",
    "Qwen3-1.7B": "Qwen/Qwen3-1.7B-Base",
    "Llama-3.2-1B": "meta-llama/Llama-3.2-1B",
    "Llama-3.2-3B": "meta-llama/Llama-3.2-3B",
    "TinyLlama-1.1B": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "SmolLM2-135M": "HuggingFaceTB/SmolLM2-135M",
    "SmolLM2-360M": "HuggingFaceTB/SmolLM2-360M",
    "Mistral-7B": "mistralai/Mistral-7B-v0.3",
}
TINY = {"tiny-qwen2": Qwen2Config, "tiny-llama": LlamaConfig}
TINY_VOCABULARY = 512
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


class BaseError(ValueError):
    """A base model that cannot be had; the message names it, the reason, and what to do instead."""


def is_tiny(name: str) -> bool:
    """True for the randomly initialised bases, whose weights mean nothing before training."""
    return name in TINY


def load_base(
    name: str, captions: Iterable[str] = (), layers: int = 4, width: int = 192, heads: int = 4
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base and its text tokenizer, on the CPU in fp32.

    name: hub name, alias (ALIASES), folder, `tiny-qwen2` (tied head) or `tiny-llama` (untied). `layers`, `width`,
    `heads` and the `captions` that the text tokenizer is trained on matter to the tiny ones alone. Raises BaseError.
    """
    if is_tiny(name):
        tokenizer = tiny_tokenizer(captions)
        return AutoModelForCausalLM.from_config(tiny_config(name, len(tokenizer), layers, width, heads)), tokenizer
    source = ALIASES.get(name, name)
    if not Path(source).is_dir() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise BaseError(f"--base {name}: no such folder, and no hub name (owner/name) or alias. {_remedy()}")
    try:
        return _load(source)
    except Exception as error:  # transformers, the hub and httpx raise families of their own
        raise BaseError(f"--base {name}: {source} cannot be loaded: {_first_line(error)}. {_remedy()}") from error


def _load(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        return _read(source, local_files_only=True)
    except Exception:
        if Path(source).is_dir():
            raise
    _reach(source)
    return _read(source, local_files_only=False)


def _read(source: str, local_files_only: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_files_only)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=local_files_only)
    return model, tokenizer


def tiny_config(name: str, vocabulary: int, layers: int, width: int, heads: int) -> Qwen2Config | LlamaConfig:
    """The config of a tiny base: Qwen2 with a tied head or Llama with its own, 1024 positions."""
    if width % (2 * heads):
        raise ValueError(
            f"width {width} must be a multiple of 2 * heads = {2 * heads} (rotary positions need even heads)"
        )
    return TINY[name](
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=round(width * 8 / 3 / 32) * 32 or 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        tie_word_embeddings=name == "tiny-qwen2",
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def tiny_tokenizer(captions: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 512 entries trained on the captions; any text can be written in it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Sorted and unique, so that the same captions in any order give the same ids.
    tokenizer.train_from_iterator(sorted(set(captions)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        additional_special_tokens=SPECIAL[1:],
        clean_up_tokenization_spaces=False,
    )


def _reach(source: str) -> None:
    """Raise OSError unless the hub answers for `source` within seconds; its own client would retry for minutes."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "TRUE", "YES", "ON"}:
        raise OSError("HF_HUB_OFFLINE is set and the model is not in the local cache")
    request = urllib.request.Request(hf_hub_url(source, "config.json"), method="HEAD", headers=build_hf_headers())
    urllib.request.urlopen(request, timeout=5).close()


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].rstrip('.')}" if text else type(error).__name__


def _remedy() -> str:
    return (
        "Give a local folder with a transformers checkpoint, a hub name or an alias "
        f"({', '.join(ALIASES)}), or --base tiny-qwen2, which needs no network"
    )
