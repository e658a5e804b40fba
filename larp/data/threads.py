"""Work shared out to threads, its results in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Argument], Result], arguments: Iterable[Argument], workers: int, ahead: int = 4
) -> Iterator[Result]:
    """Yield function(argument) in order, computed by `workers` threads, at most `ahead` results of each before they are needed.

    That bounds the memory. No workers: computed when asked for. An exception comes where its result would have come.
    """
    if not workers:
        yield from map(function, arguments)
        return
    pending: deque = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for argument in arguments:
                pending.append(pool.submit(function, argument))
                if len(pending) > ahead * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for call in pending:
                call.cancel()
