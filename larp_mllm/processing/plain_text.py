"""PlainText: what a user or a data set writes -> text ids, of which none is a control token, whatever is written."""

import json
import re
import secrets
from typing import Any

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class PlainText:
    """Encodes text with a tokenizer of transformers from which everything but text was taken out.

    transformers' own `split_special_tokens` does not do: tokens added as non-special are still matched, and entries of the
    vocabulary such as `<s>` can still be merged from their letters. Of a tokenizer of the `tokenizers` library a copy
    is made without them; the others are asked for text alone, and what they answer is checked.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.controls = control_ids(tokenizer)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._copy = None if backend is None else _without_controls(backend, self.controls)

    def encode(self, text: str) -> list[int]:
        """Text -> ids, without begin or end ids. What the vocabulary cannot write becomes its unknown token, if it has one.

        Raises ValueError for text that no encoding can hold, and if the tokenizer makes a control token of plain text
        nevertheless.
        """
        if not text:
            return []
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text {text[:80]!r} holds half a character (a lone surrogate) at position {error.start}: remove it, or "
                "decode the text in its own encoding"
            ) from error
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
    """The ids that typed text must never become: special and added tokens, but for single characters and white space.

    Runs of white space are added tokens of some bases and mean nothing but themselves.
    """
    added = {id for id, token in tokenizer.added_tokens_decoder.items() if not _is_harmless(token.content)}
    special = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return added | {id for id, content in special if not _is_harmless(content)}


def _is_harmless(content: str) -> bool:
    return len(content) < 2 or not content.replace("▁", " ").strip()


def _without_controls(backend: Tokenizer, controls: set[int]) -> Tokenizer:
    state = json.loads(backend.to_str())
    state["truncation"] = state["padding"] = None
    # It puts begin and end tokens, which are not asked for here, and may name some that are gone.
    state["post_processor"] = None
    # Control tokens keep their ids, but get names that nobody can type.
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
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, model, renamed)]
    return Tokenizer.from_str(json.dumps(state))


def _makes(merge: str | list[str], model: dict, renamed: dict[str, str]) -> bool:
    """Whether a merge makes, or needs, a control token or (where bytes have tokens) the token of a byte."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    made = left + right.removeprefix(model.get("continuing_subword_prefix") or "")
    return not renamed.keys().isdisjoint((left, right, made)) or bool(model.get("byte_fallback") and _BYTE.match(made))
