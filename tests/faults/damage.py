"""Plain values of a JSON file, damaged at one place."""

from collections.abc import Iterator
from typing import Any

Place = tuple[str | int, ...]


def places(value: Any, where: Place = ()) -> Iterator[Place]:
    """Yield the path of each value in nested dicts and lists, the outermost first."""
    yield where
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from places(child, (*where, name))


def damaged(value: Any, where: Place, new: Any) -> Any:
    """Return a copy of nested plain values in which the one at `where` is `new`, or missing if that is ...."""
    if not where:
        return new
    copy = value.copy()
    if len(where) == 1 and new is ...:
        del copy[where[0]]
    else:
        copy[where[0]] = damaged(copy[where[0]], where[1:], new)
    return copy
