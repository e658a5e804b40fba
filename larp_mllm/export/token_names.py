"""Tokens for video ids in an exported text tokenizer, with exactly the ids of the vocabulary."""

import copy
from pathlib import Path

from larp_mllm.model.vocabulary import Vocabulary
from larp_mllm.processing.chat import DEFAULT_TEMPLATE, stop_ids

import transformers
from transformers import AddedToken, PreTrainedConfig

_PROBES = (
    "a person surfing",
    " 12345 Don't  stop,\n\nnever;\t(ever) 3.14",
    "Ein Mann fährt Rad 🚲, e\u0301",
    "<s>[INST]",
)


def add_tokens(tokenizer, vocabulary: Vocabulary, folder: Path) -> tuple[object, dict[str, str]]:
    """Save a copy of a tokenizer with tokens for all ids up to the last code into `folder`; return it and their names.

    The tokens are `<|video_start|>`, `<|video_end|>` and `<|code_0|>` to `<|code_K-1|>`, with another prefix if the base has
    tokens of these names. Ids between the tokenizer's own and the end of the text ids get unused tokens. Raises ValueError
    if a token does not get its id.
    """
    own = tokenizer.get_vocab()
    first = max(own.values()) + 1
    if first > vocabulary.text_size:
        raise ValueError(
            f"the text tokenizer has ids up to {first - 1}, but text ends at {vocabulary.text_size - 1}: the model's tokenizer "
            "files were changed, restore them"
        )
    prefix = _free_prefix(own)
    fillers = [f"<|{prefix}unused_{id}|>" for id in range(first, vocabulary.text_size)]
    controls = [f"<|{prefix}video_start|>", f"<|{prefix}video_end|>"]
    codes = [f"<|{prefix}code_{code}|>" for code in range(vocabulary.codebook_size)]
    tokens = [*fillers, *controls, *codes]
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    found = extended.get_vocab()
    wrong = [(id, token) for id, token in enumerate(tokens, first) if found.get(token) != id]
    if wrong:
        id, token = wrong[0]
        raise ValueError(
            f"the text tokenizer ({type(tokenizer).__name__}) gives {token} the id {found.get(token)}, needed is {id}: its ids "
            "have gaps, so a stock tokenizer cannot name the video ids"
        )
    _prepare_for_servers(extended)
    extended.save_pretrained(folder)
    named = {"video_start": controls[0], "video_end": controls[1], "code": f"<|{prefix}code_{{}}|>"}
    return extended, named


def _prepare_for_servers(tokenizer) -> None:
    """Give a tokenizer the chat template of training, and a response template that keeps the tokens of videos.

    Without the latter `transformers serve` removes all special tokens from an answer, and videos with them.
    """
    if not tokenizer.chat_template:
        # A space belongs to the word after it: `chat_segments` ends a prompt without it, too.
        tokenizer.chat_template = DEFAULT_TEMPLATE.replace("Assistant: {% endif %}", "Assistant:{% endif %}")
    if getattr(tokenizer, "response_template", None) is None:
        content = {"content": "text"}
        if stops := tokenizer.convert_ids_to_tokens(stop_ids(tokenizer)):
            content["close"] = stops
        tokenizer.response_template = {
            "defaults": {"role": "assistant", "content": ""},
            "start_anchor_pattern": r"\Z",  # the answer begins where the prompt ends
            "fields": {"content": content},
        }


def loader_of(tokenizer, folder: Path, config: PreTrainedConfig) -> str:
    """Return the class of transformers that loads the saved tokenizer unchanged: AutoTokenizer, if it does.

    For some model types AutoTokenizer builds the usual tokenizer of the type from the tokens in the file. Raises ValueError
    if no class loads it unchanged.
    """
    config.save_pretrained(folder)
    backend = ["PreTrainedTokenizerFast"] if hasattr(tokenizer, "backend_tokenizer") else []
    for name in ("AutoTokenizer", *backend, type(tokenizer).__name__):
        if hasattr(transformers, name) and _reads(getattr(transformers, name), tokenizer, folder):
            return name
    raise ValueError(f"transformers does not load the text tokenizer ({type(tokenizer).__name__}) as it was saved")


def _reads(loader: type, tokenizer, folder: Path) -> bool:
    try:
        loaded = loader.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # transformers raises many types; this loader fails
        return False
    return loaded.get_vocab() == tokenizer.get_vocab() and all(
        loaded.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
        for text in _PROBES
    )


def _free_prefix(own: dict[str, int]) -> str:
    for prefix in ("", "larp_", *(f"larp{number}_" for number in range(2, 1000))):
        starts = tuple(f"<|{prefix}{name}" for name in ("video_start|>", "video_end|>", "code_", "unused_"))
        if not any(word.startswith(starts) for word in own):
            return prefix
    raise ValueError("the text tokenizer has tokens of all the names that video ids could get")
