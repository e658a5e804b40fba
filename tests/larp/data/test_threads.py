"""Work shared out to threads."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from larp.data.loader import in_order

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


def test_closed_it_waits_for_the_calls_that_run_and_drops_the_others():
    ended = []

    def slow(number: int) -> None:
        time.sleep(0.1 * number)
        ended.append(number)

    results = in_order(slow, range(9), 2)
    next(results)
    results.close()
    before = list(ended)
    time.sleep(0.3)
    assert ended == before and 1 in ended and 8 not in ended


def test_ctrl_c_twice_leaves_no_thread_behind():
    """The interpreter's end would find it running, and torch aborts the process then."""
    code = (
        "import signal, time; from larp.data.loader import in_order\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def call(_): print('running', flush=True); time.sleep(1.5); print('done', flush=True)\n"
        "for _ in in_order(call, range(9), 1): pass"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[3],
    )
    assert process.stdout.readline() == "running\n"
    for _ in range(2):
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=60)
    assert said == "done\n" and error.rstrip().endswith("KeyboardInterrupt")
