"""Work shared out to threads, its results in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Argument], Result], arguments: Iterable[Argument], workers: int, ahead: int = 4
) -> Iterator[Result]:
    """Yield function(argument) in order, computed by `workers` threads, at most `ahead` results of each before they are needed.

    That bounds the memory. No workers: computed when asked for. An exception comes where its result would have come.
    Closed, or ended by an exception, it waits for the calls that run and drops the others.
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
                    yield _first(pending)
            while pending:
                yield _first(pending)
        finally:
            running = [call for call in pending if not call.cancel()]
            # A second Ctrl-C while the pool joins its threads would make Python (before 3.13) forget that they run, and
            # torch aborts the process if one of them outlives the interpreter. Here it does no harm.
            wait(running)


def _first(pending: deque) -> Result:
    result = pending[0].result()  # stays among them until it is there, so that it is waited for
    pending.popleft()
    return result
