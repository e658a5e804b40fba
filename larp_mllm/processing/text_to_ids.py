"""PlainText: text of users and data sets -> text ids, none of them a control token."""

import json
import re
import secrets
from typing import Any

from larp_mllm.checks import check_encodable

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class PlainText:
    """Encodes text with a tokenizer of transformers so that no control token results.

    `split_special_tokens` of transformers is not enough: it still matches tokens that were added as non-special, and
    entries of the vocabulary such as `<s>` can be merged from their letters. A tokenizer of the `tokenizers` library is
    copied without control tokens. Other tokenizers encode with `split_special_tokens`, and their ids are checked.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.controls = control_ids(tokenizer)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._copy = None if backend is None else _without_controls(backend, self.controls)

    def encode(self, text: str) -> list[int]:
        """Text -> ids, without begin and end ids. Characters outside the vocabulary become its unknown token, if it has one.

        Raises ValueError for lone surrogates, and if a tokenizer that cannot be copied returns a control token.
        """
        if not text:
            return []
        check_encodable(text, f"the text {text[:80]!r}")
        if self._copy is not None:
            return self._copy.encode(text, add_special_tokens=False).ids
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if wrong := self.controls.intersection(ids) - {self.tokenizer.unk_token_id}:
            raise ValueError(
                f"the text tokenizer ({type(self.tokenizer).__name__}) reads plain text as its control tokens "
                f"{sorted(map(self.tokenizer.convert_ids_to_tokens, wrong))}: use the tokenizer.json of this base model"
            )
        return ids


def control_ids(tokenizer) -> set[int]:
    """The ids that text must never be encoded to: special and added tokens, except single characters and white space.

    Some bases add runs of white space as tokens, which are plain text.
    """
    added = {id for id, token in tokenizer.added_tokens_decoder.items() if not _is_harmless(token.content)}
    special = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return added | {id for id, content in special if not _is_harmless(content)}


def _is_harmless(content: str) -> bool:
    return len(content) < 2 or not content.replace("▁", " ").strip()


def _without_controls(backend: Tokenizer, controls: set[int]) -> Tokenizer:
    state = json.loads(backend.to_str())
    state["truncation"] = state["padding"] = None
    # It adds begin and end tokens, and may name tokens that are renamed below.
    state["post_processor"] = None
    # Control tokens keep their ids, but get names that cannot be guessed.
    secret = secrets.token_hex(16)
    for token in state["added_tokens"]:
        if token["id"] in controls:
            token["content"] = f"{secret}{token['id']}"
    model = state["model"]
    vocabulary: Any = model["vocab"]
    if isinstance(vocabulary, dict):
        renamed = {name: f"{secret}{id}" for name, id in vocabulary.items() if id in controls}
        model["vocab"] = {renamed.get(name, name): id for name, id in vocabulary.items()}
    else:  # Unigram: names and scores, in the order of the ids
        renamed = {name: f"{secret}{id}" for id, (name, _) in enumerate(vocabulary) if id in controls}
        model["vocab"] = [[renamed.get(name, name), score] for name, score in vocabulary]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _yields_control(merge, model, renamed)]
    return Tokenizer.from_str(json.dumps(state))


def _yields_control(merge: str | list[str], model: dict, renamed: dict[str, str]) -> bool:
    """Whether a merge yields or needs a control token, or yields the token of a byte."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    merged = left + right.removeprefix(model.get("continuing_subword_prefix") or "")
    return not renamed.keys().isdisjoint((left, right, merged)) or bool(
        model.get("byte_fallback") and _BYTE.match(merged)
    )
