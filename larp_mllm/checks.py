"""What callers pass, checked before a model is loaded; light, so that a command refuses it at once."""

import math
from collections.abc import Sequence
from numbers import Integral, Real


def check_count(name: str, value: int, least: int = 1) -> None:
    """ValueError that names the option unless `value` is a whole number of at least `least`."""
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_seed(seed: int) -> None:
    """ValueError unless `seed` is a whole number."""
    if not isinstance(seed, Integral):
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
    """ValueError unless `seconds` is a positive finite number."""
    if not (isinstance(seconds, Real) and 0 < seconds < math.inf):
        raise ValueError(f"seconds is {seconds!r}; it must be a finite number above 0")
