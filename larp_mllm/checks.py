"""What callers pass, checked before a model is loaded; light, so that a command refuses it at once."""

import math
from collections.abc import Sequence

from larp.config import check_count as check_count
from larp.config import is_number
from larp.config import is_whole as is_whole

_LONGEST = 3600
_LATEST = 1e8
"""Seconds, about three years: beyond it a start is a mistake, and the number of its frame may be none."""


def check_seed(seed: int) -> None:
    """ValueError unless `seed` is a whole number."""
    if not is_whole(seed):
        raise ValueError(f"seed must be a whole number, got {seed!r}")


def check_prompts(prompts: Sequence[str]) -> None:
    """ValueError unless `prompts` is a list of texts that can be encoded."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(f"a prompt must be a str, several a list of them, got {prompts!r}")
    for prompt in prompts:
        check_prompt(prompt)


def check_prompt(prompt: str) -> None:
    """ValueError unless `prompt` is a text that can be encoded."""
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt must be a str, several a list of them, got {prompt!r}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt {prompt!r} holds half a character (a lone surrogate) at position {error.start}: remove it, or "
            "decode the text in its own encoding"
        ) from error


def check_seconds(seconds: float) -> None:
    """ValueError unless `seconds` is a number above 0, and at most an hour: more would be sampled for days."""
    if not (is_number(seconds) and 0 < seconds < math.inf):
        raise ValueError(f"seconds is {seconds!r}; it must be a finite number above 0")
    if seconds > _LONGEST:
        raise ValueError(f"seconds is {seconds:g}; at most {_LONGEST} are sampled at a time: go on from the result")


def check_start(start: object, where: str) -> float | None:
    """The "start" of a video as seconds; ValueError unless it is absent (None) or a number from 0 to 1e8."""
    if start is None:
        return None
    if not is_number(start) or not 0 <= start <= _LATEST:
        raise ValueError(f'{where}: "start" must be a number of seconds from 0 to {_LATEST:g}, got {str(start)[:40]}')
    return float(start)


def check_progress(progress: object) -> None:
    """ValueError unless `progress` can be called, or is None."""
    if progress is not None and not callable(progress):
        raise ValueError(f"progress must be a function of a Progress, or None, got {progress!r}")
