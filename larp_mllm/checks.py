"""Checks of arguments before a model is loaded. This module imports nothing heavy, so that commands fail at once."""

import math
from collections.abc import Sequence

from larp.config import is_number, is_whole

# Seconds of a continuation at most.
_MAX_SECONDS = 3600
# Seconds (three years), so that the number of a frame fits an integer.
_MAX_START = 1e8


def check_seed(seed: int) -> None:
    """Raise ValueError unless `seed` is a whole number."""
    if not is_whole(seed):
        raise ValueError(f"seed must be a whole number, got {seed!r}")


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise ValueError unless `prompts` is a list of valid texts."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(f"a prompt must be a str, several a list of them, got {prompts!r}")
    for prompt in prompts:
        check_prompt(prompt)


def check_prompt(prompt: str) -> None:
    """Raise ValueError unless `prompt` is a str without lone surrogates."""
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt must be a str, several a list of them, got {prompt!r}")
    check_encodable(prompt, f"the prompt {prompt[:80]!r}")


def check_encodable(text: str, where: str) -> None:
    """Raise ValueError, naming `where`, for a lone surrogate, which no encoding and no tokenizer can represent."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds half a character (the lone surrogate \\u{ord(text[error.start]):04x}) at position {error.start}: "
            "remove it, or decode the text in its own encoding"
        ) from error


def check_seconds(seconds: float) -> None:
    """Raise ValueError unless `seconds` is a number above 0 and at most 3600, since more would take days."""
    if not (is_number(seconds) and 0 < seconds < math.inf):
        raise ValueError(f"seconds is {seconds!r}; it must be a finite number above 0")
    if seconds > _MAX_SECONDS:
        raise ValueError(f"seconds is {seconds:g}; at most {_MAX_SECONDS} are sampled at a time: continue the result")


def check_start(start: object, where: str) -> float | None:
    """The "start" of a video in seconds, or None. Raises ValueError for other types, and outside 0 to 1e8."""
    if start is None:
        return None
    if not is_number(start) or not 0 <= start <= _MAX_START:
        raise ValueError(
            f'{where}: "start" must be a number of seconds from 0 to {_MAX_START:g}, got {str(start)[:40]}'
        )
    return float(start)


def check_progress(progress: object) -> None:
    """Raise ValueError unless `progress` is callable or None."""
    if progress is not None and not callable(progress):
        raise ValueError(f"progress must be a function of a Progress, or None, got {progress!r}")
