"""Names of classes as people type them: "horse race", "horse_race" and "HorseRace" are one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence


def class_number(name: str, known: Sequence[str]) -> int | None:
    """Return the place of a class among the known names, None if it is none of them, or could be several.

    Case, spaces, underscores and hyphens do not matter, unless the name is exactly one of the known.
    """
    if name in known:
        return known.index(name)
    alike = [number for number, other in enumerate(known) if _folded(other) == _folded(name)]
    return alike[0] if len(alike) == 1 else None


def unknown_class(name: str, known: Sequence[str]) -> str:
    """Return the message for a name without a class: the nearest known names, and how many there are."""
    if not known:
        return f"unknown class {name!r}; this checkpoint stores no class names: use numbers"
    folded = {_folded(other): other for other in known}
    near = difflib.get_close_matches(_folded(name), folded, n=3, cutoff=0.4)
    if nearest := [other for other in known if _folded(other) in near]:
        return f"unknown class {name!r}; nearest: {', '.join(nearest)} (of {len(known)})"
    return f"unknown class {name!r}; there are {len(known)}: {', '.join(known[:6])}{', ...' if len(known) > 6 else ''}"


def _folded(name: str) -> str:
    return re.sub(r"(?<=\w)[\s_-]+|_", "", name.strip()).casefold()  # the sign of a number stays
