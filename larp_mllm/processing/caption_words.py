"""The words of a model's training captions, by which a prompt that is far from them is recognised."""

import re
from collections import Counter
from collections.abc import Collection
from typing import Any

_MOST_WORDS, _EXAMPLES = 2000, 10
_WORD = re.compile(r"[^\W\d_]{2,}")
# Words without content, and those that every caption may have.
_COMMON = frozenset({
    "an", "the", "of", "in", "on", "is", "are", "was", "and", "or", "with", "to", "at", "it", "its", "that", "this",
    "there", "from", "by", "for", "as", "into", "over", "up", "down", "someone", "something", "person", "people",
    "man", "woman", "men", "women", "he", "she", "they", "his", "her", "their", "video", "clip", "show", "shows",
    "showing", "me", "please", "make",
})  # fmt: skip
# Words that begin alike count as one: surfer and surfing, pianist and piano.
_STEM = 4


def describe_captions(texts: Collection[str]) -> dict[str, Any]:
    """Return what a model folder records of the captions that it was trained on: their `words`, and `examples` of different words."""
    words_of = {text: content_words(text) for text in texts}
    words = Counter(word for found in words_of.values() for word in found)
    return {"words": sorted(word for word, _ in words.most_common(_MOST_WORDS)), "examples": _examples(words_of)}


def _examples(words_of: dict[str, list[str]]) -> list[str]:
    """Return up to ten of the texts, one after the other that which has the largest share of words that are new."""
    left, seen, chosen = sorted(words_of, key=lambda text: (len(text), text)), set(), []
    while left and len(chosen) < _EXAMPLES:
        new = [(len(set(found) - seen) / len(found) if (found := words_of[text]) else 0.0) for text in left]
        chosen.append(left.pop(new.index(max(new))))
        seen.update(words_of[chosen[-1]])
    return chosen


def content_words(text: str) -> list[str]:
    """Return the lower-case words of a text that say what it is about."""
    return [word for word in _WORD.findall(text.lower()) if word not in _COMMON]


def are_captions(captions: Any) -> bool:
    """Whether this is what `describe_captions` returns, or None."""
    if not isinstance(captions, dict | None):
        return False
    lists = [(captions or {}).get(name) or [] for name in ("words", "examples")]
    return all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in lists)


def is_far(prompt: str, words: Collection[str]) -> bool:
    """Whether a prompt has words with content, but none that begins like one of `words`; never where these may not be all."""
    if len(words) >= _MOST_WORDS:
        return False
    stems = {word[:_STEM] for word in words}
    found = content_words(prompt)
    return bool(found and words) and not any(word[:_STEM] in stems for word in found)
