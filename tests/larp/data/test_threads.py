"""Work shared out to threads."""

import threading

from larp.data.threads import in_order

import pytest


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order_and_only_a_few_ahead(workers):
    begun, lock = [], threading.Lock()

    def square(number: int) -> int:
        with lock:
            begun.append(number)
        return number * number

    results = in_order(square, range(100), workers, ahead=2)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert len(begun) <= 5 + 2 * workers + 1
    assert list(results) == [number * number for number in range(5, 100)]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_comes_where_its_result_would_have_come(workers):
    results = in_order(lambda number: 1 // (number - 3), range(9), workers)
    assert [next(results) for _ in range(3)] == [-1, -1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)
