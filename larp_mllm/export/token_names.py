"""The words of video ids in an exported text tokenizer: names that get exactly the ids of the layout."""

import copy
from pathlib import Path

from larp_mllm.model.vocabulary import Vocabulary

import transformers
from transformers import AddedToken, PreTrainedConfig

_PROBES = (
    "a person surfing",
    " 12345 Don't  stop,\n\nnever;\t(ever) 3.14",
    "Ein Mann fährt Rad 🚲, e\u0301",
    "<s>[INST]",
)


def add_words(tokenizer, vocabulary: Vocabulary, folder: Path) -> tuple[object, dict[str, str]]:
    """Save a copy of `tokenizer` with words for all ids up to the last code into `folder`; returns it and the words.

    Ids between the tokenizer's own and the text rows of the base get fillers. The names are `<|video_start|>`,
    `<|video_end|>` and `<|code_0|>` to `<|code_K-1|>`, or with another prefix if the base has words of these names.
    Raises ValueError if an id is not had.
    """
    own = tokenizer.get_vocab()
    first = max(own.values()) + 1
    if first > vocabulary.text_size:
        raise ValueError(
            f"the text tokenizer has words up to the id {first - 1}, but text ends at {vocabulary.text_size - 1}: the model's "
            "tokenizer files were changed, restore them"
        )
    prefix = _free_prefix(own)
    fillers = [f"<|{prefix}unused_{id}|>" for id in range(first, vocabulary.text_size)]
    controls = [f"<|{prefix}video_start|>", f"<|{prefix}video_end|>"]
    codes = [f"<|{prefix}code_{code}|>" for code in range(vocabulary.codebook_size)]
    words = [*fillers, *controls, *codes]
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens([AddedToken(word, special=True, normalized=False) for word in words], special_tokens=True)
    found = grown.get_vocab()
    wrong = [(id, word) for id, word in enumerate(words, first) if found.get(word) != id]
    if wrong:
        id, word = wrong[0]
        raise ValueError(
            f"the text tokenizer ({type(tokenizer).__name__}) gives {word} the id {found.get(word)}, needed is {id}: its ids "
            "have gaps, so a stock tokenizer cannot name the video ids"
        )
    grown.save_pretrained(folder)
    named = {"video_start": controls[0], "video_end": controls[1], "code": f"<|{prefix}code_{{}}|>"}
    return grown, named


def loader_of(tokenizer, folder: Path, config: PreTrainedConfig) -> str:
    """The class of transformers that reads the saved tokenizer as what it is: AutoTokenizer, if it does.

    For some model types that one makes the usual tokenizer of the type from the words that it finds in the file. Raises
    ValueError if none reads it so.
    """
    config.save_pretrained(folder)
    backend = ["PreTrainedTokenizerFast"] if hasattr(tokenizer, "backend_tokenizer") else []
    for name in ("AutoTokenizer", *backend, type(tokenizer).__name__):
        if hasattr(transformers, name) and _reads(getattr(transformers, name), tokenizer, folder):
            return name
    raise ValueError(f"transformers does not read back the text tokenizer ({type(tokenizer).__name__}) that it wrote")


def _reads(loader: type, tokenizer, folder: Path) -> bool:
    try:
        loaded = loader.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # whatever it is: this loader is not the one
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
    raise ValueError("the text tokenizer has words of all the names that video ids could have")
