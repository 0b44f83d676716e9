"""Work by several processes is `map`: order, laziness, errors; and no process outlives its use."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing

import psutil
import pytest

from lavis.core.errors import ConfigError, DataError, LavisError, RegistryError
from lavis.core.types import RowError
from lavis.data.pool import ordered_map, usable_cores

PROCESSES = 3


class OddError(LavisError):
    """Not made again by its message alone."""

    def __init__(self, number: int, place: str) -> None:
        super().__init__(f"{place} has {number}")
        self.number = number


def slow_if_even(n: int) -> tuple[int, int]:
    time.sleep(0.02 * (n % 2 == 0))
    return n, os.getpid()


def test_results_are_in_order_and_made_by_several_processes() -> None:
    results = list(ordered_map(slow_if_even, range(40), PROCESSES))
    assert [n for n, _ in results] == list(range(40))
    assert len({pid for _, pid in results} - {os.getpid()}) == PROCESSES
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("count", "processes"), [(40, 0), (40, 1), (2, PROCESSES), (0, PROCESSES)])
def test_without_processes_or_with_little_to_do_it_is_done_here(count: int, processes: int) -> None:
    results = list(ordered_map(slow_if_even, range(count), processes))
    assert results == [(n, os.getpid()) for n in range(count)]


def test_what_has_been_inherited_needs_no_pickling() -> None:
    secret = {7: lambda n: n + 1}
    assert list(ordered_map(lambda n: secret[7](n), range(9), 2)) == list(range(1, 10))


def test_items_are_taken_as_they_are_needed() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while taken < 1000:
            taken += 1
            yield taken

    results = ordered_map(slow_if_even, items(), PROCESSES)
    with closing(results):
        for done in range(1, 20):
            next(results)
            assert taken - done <= 2 * PROCESSES
    assert not multiprocessing.active_children()


def test_large_items_and_results_do_not_stop_each_other() -> None:
    items = [bytes([n]) * (4 << 20) for n in range(12)]
    assert list(ordered_map(bytes.upper, items, 2)) == [item.upper() for item in items]


def test_what_cannot_be_sent_is_worked_on_here() -> None:
    items = [lambda n=n: n for n in range(9)]
    assert list(ordered_map(lambda item: item(), items, 2)) == list(range(9))


ERRORS = [
    ConfigError("a key is wrong"),
    RegistryError("unknown name"),
    RowError("a reason", "row 3", "Mend it.", "a detail"),
    OddError(3, "here"),
    KeyError("a bug"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("processes", [1, 2])
def test_errors_are_what_they_were_and_come_after_the_results_before_them(error: Exception, processes: int) -> None:
    def work(n: int) -> int:
        if n == 5:
            raise error
        return n

    results, got = ordered_map(work, range(20), processes), []
    with pytest.raises(type(error)) as caught:
        got.extend(results)
    assert got == [0, 1, 2, 3, 4]
    assert str(caught.value) == str(error) and vars(caught.value) == vars(error)
    if processes > 1:
        assert "in work" in str(caught.value.__cause__)  # where it was raised
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_error_is_told_whoever_makes_it(processes: int) -> None:
    def items() -> Iterator[int]:
        yield from range(8)
        raise DataError("the file is cut off")

    with pytest.raises(DataError, match="cut off"):
        list(ordered_map(slow_if_even, items(), processes))
    with pytest.raises(ZeroDivisionError):
        list(ordered_map(lambda n: 1 // (n - 6), items(), processes))


def test_a_process_that_is_killed_is_an_error_that_says_what_to_do() -> None:
    def work(n: int) -> int:
        if n == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return n

    with pytest.raises(DataError, match=r"exit code -9.*data\.prepare_workers"):
        list(ordered_map(work, range(100), 2))
    assert not multiprocessing.active_children()


CHILD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, and all below it, ignore it
from lavis.data.pool import ordered_map
def work(n):
    time.sleep(30 * (n > 2))
    return n
for n in ordered_map(work, range(100), 2):
    print(n, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_the_one_that_they_work_for(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout and process.stdout.readline() == "0\n"
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=10)
    assert psutil.wait_procs(children, timeout=5)[1] == []
    assert said.count("Traceback") == (number == signal.SIGINT)  # of the first process alone


def test_what_is_proposed_is_what_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert usable_cores() == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(96)), raising=False)
    assert usable_cores() == 8
