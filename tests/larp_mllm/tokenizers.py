"""Builders of tiny text tokenizers, one of each kind that a base may have, trained without a network."""

import io
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AddedToken,
    AutoTokenizer,
    ByT5Tokenizer,
    GPT2Tokenizer,
    GPTSw3Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

# Frequent strings become entries, such as "s>" and "<0x0", from which control tokens could be merged.
CORPUS = [
    "a person surfing on a wave", "a red circle moving left", "the man plays the violin", "two people play the piano",
    "s> s> s> /s> /s> unk> unk> INST] INST] im_start im_end |> <| <|im begin_of_text video_start code_5",
    "Ein Mann fährt Rad, 12345 times; (brackets) [and] {more} <tags>\n\ttabs   and spaces",
] * 20  # fmt: skip
CHAT = ["<|im_start|>", "<|im_end|>"]
QWEN3 = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
SMOLLM = [
    "<|endoftext|>",
    *CHAT,
    "<repo_name>",
    "<reponame>",
    "<file_sep>",
    "<filename>",
    "<gh_stars>",
    "<empty_output>",
]
LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MISTRAL = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"]
VIDEO = ["<|video_start|>", "<|video_end|>", "<|code_0|>", "<|code_5|>"]
_LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def qwen2(folder: Path) -> Qwen2Tokenizer:
    """Byte-level BPE with an end-of-text token only, as in base models."""
    return Qwen2Tokenizer(**_byte_level(["<|endoftext|>"]))


def qwen2_chat(folder: Path) -> Qwen2Tokenizer:
    """Byte-level BPE with the special tokens of chats."""
    tokenizer = qwen2(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": CHAT})
    return tokenizer


def qwen3(folder: Path) -> Qwen2Tokenizer:
    """Byte-level BPE with added tokens that are not special."""
    tokenizer = qwen2_chat(folder)
    tokenizer.add_tokens([AddedToken(content, special=False, normalized=False) for content in QWEN3])
    return tokenizer


def smollm(folder: Path) -> GPT2Tokenizer:
    """GPT-2's tokenizer with the special tokens first in the vocabulary, as in SmolLM."""
    tokenizer = GPT2Tokenizer(**_byte_level(SMOLLM))
    tokenizer.add_special_tokens({"additional_special_tokens": SMOLLM[1:]})
    return tokenizer


def llama3(folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE that matches whole words first (ignore_merges) and adds its begin token."""
    parts = _byte_level([])
    tokenizer = Tokenizer(models.BPE(vocab=parts["vocab"], merges=parts["merges"], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*LLAMA3, *(f"<|reserved_special_token_{i}|>" for i in range(8))])
    begin = LLAMA3[0]
    template = {"single": f"{begin} $A", "special_tokens": [(begin, tokenizer.token_to_id(begin))]}
    tokenizer.post_processor = processors.TemplateProcessing(**template)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=LLAMA3[1])


def llama2(folder: Path, legacy: bool = False, controls: tuple[str, ...] = ()) -> LlamaTokenizer:
    """A sentencepiece model with byte fallback, read from tokenizer.model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(_sentencepiece(controls))
    return LlamaTokenizer.from_pretrained(folder, legacy=legacy)


def llama2_legacy(folder: Path) -> LlamaTokenizer:
    """Llama 2's with the legacy rule for spaces after special tokens."""
    return llama2(folder, legacy=True)


def llama2_json(folder: Path) -> PreTrainedTokenizerFast:
    """Llama 2's as published: tokenizer.json with a normalizer and no pre-tokenizer, class chosen by AutoTokenizer.

    As in older conversions, merges of letters yield control tokens and tokens of bytes.
    """
    built = llama2(folder)
    state = json.loads(built.backend_tokenizer.to_str())
    words, letters = state["model"]["vocab"], ["0 A", "0A >", "< 0", "<0 x", "<0x 0A>", "< s>"]
    for pair in letters:
        for word in (*pair.split(), pair.replace(" ", "")):
            words.setdefault(word, len(words))
    state["model"]["merges"] = [pair.split() for pair in letters] + state["model"]["merges"]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    (folder / "tokenizer.model").unlink()
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder)


def mistral(folder: Path) -> LlamaTokenizer:
    """Sentencepiece with control tokens for instructions."""
    tokenizer = llama2(folder, controls=tuple(MISTRAL))
    tokenizer.add_special_tokens({"additional_special_tokens": MISTRAL})
    return tokenizer


def sentencepiece_slow(folder: Path) -> GPTSw3Tokenizer:
    """A tokenizer of transformers that uses the sentencepiece library."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(_sentencepiece(()))
    special = dict(pad_token="<unk>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer = GPTSw3Tokenizer(str(folder / "spiece.model"), **special)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    return tokenizer


def python_slow(folder: Path) -> ByT5Tokenizer:
    """A tokenizer in Python: bytes after the special tokens."""
    return ByT5Tokenizer(extra_ids=4)


def with_video_words(folder: Path) -> Qwen2Tokenizer:
    """Byte-level BPE that already has tokens with the names of our control tokens."""
    tokenizer = qwen3(folder)
    tokenizer.add_tokens([AddedToken(content, special=True) for content in VIDEO])
    return tokenizer


BUILDERS: dict[str, Callable[[Path], object]] = {
    build.__name__: build
    for build in (
        *(qwen2, qwen2_chat, qwen3, smollm, llama3, llama2, llama2_legacy, llama2_json, mistral),
        *(sentencepiece_slow, python_slow, with_video_words),
    )
}


@lru_cache
def _trained(special: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def _byte_level(special: list[str]) -> dict:
    model = json.loads(_trained(tuple(special)))["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


@lru_cache
def _sentencepiece(controls: tuple[str, ...]) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        character_coverage=1.0,
        control_symbols=list(controls),
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        split_by_unicode_script=False,
        split_by_number=False,
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()
