"""Work on a stream of items by several processes: results in the items' order, in bounded memory, errors as they were.

The processes are forked, so they have what this one has imported, parts of a user's own too, and nothing but items and
results is pickled. Where that is not to be had, the work is done here.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from types import TracebackType
from typing import Any, Generic, TypeVar

from lavis.core.errors import DataError

T = TypeVar("T")
R = TypeVar("R")

_WORTH_IT = 3
"""Items from which on other processes take part: starting them takes as long as an item or two."""
_AHEAD = 2
"""Items that a process has at a time: it works on one while the next is on its way."""
_MOST = 8
"""Processes that are proposed at most: one that reads can keep no more of them busy."""
_RUST_THREADS = "TOKENIZERS_PARALLELISM"
_UNSENDABLE = (pickle.PicklingError, AttributeError, TypeError)
"""What pickle says of things that it can't send."""


def usable_cores() -> int:
    """Cores that this process may use, 8 at most: processes that a stream of items is worth."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST)


def ordered_map(work: Callable[[T], R], items: Iterable[T], processes: int) -> Generator[R, None, None]:
    """As `map`, by so many processes; by this one if they are fewer than 2, or the items are few.

    An error of `work`, or of an item's making, is raised where `map` would raise it. Close the iterator if it is not
    used up: then the processes end.
    """
    iterator = iter(items)
    first = list(itertools.islice(iterator, _WORTH_IT))
    items = itertools.chain(first, iterator)
    if processes < 2 or len(first) < _WORTH_IT or not _can_fork():
        yield from map(work, items)
        return
    with _Pool(work, processes) as pool:
        yield from pool.map(items)


def _can_fork() -> bool:
    """Not on Windows; not on macOS, whose own libraries forbid it; not in a process that may have no children."""
    return sys.platform == "linux" and not multiprocessing.current_process().daemon


class _Remote(Exception):
    """Cause of an error from another process: the traceback there."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _Failure:
    """An error on its way between processes. Its class need not be one that pickle can make again by calling it."""

    def __init__(self, error: BaseException) -> None:
        self.text = "".join(traceback.format_exception(error))
        parts = (type(error), error.args, error.__dict__)
        self.pickled = _dumped(parts) or _dumped((type(error), (str(error),), {}))

    def error(self) -> BaseException:
        """The error."""
        if self.pickled is None:
            return RuntimeError(self.text)
        kind, args, values = pickle.loads(self.pickled)
        error = kind.__new__(kind)
        error.args = args
        error.__dict__.update(values)
        error.__cause__ = _Remote(self.text)
        return error


def _dumped(value: Any) -> bytes | None:
    try:
        dumped = pickle.dumps(value)
        pickle.loads(dumped)
    except Exception:  # noqa: BLE001  (a class of a user's own may do anything)
        return None
    return dumped


class _Worker(Generic[T, R]):
    """A process that works on what it is sent, item by item."""

    def __init__(self, work: Callable[[T], R], others: list[Connection]) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self.process: ForkProcess = context.Process(
            target=_serve, args=(work, theirs, [*others, self.pipe]), daemon=True
        )
        self.process.start()
        theirs.close()

    def send(self, item: T) -> None:
        """Raises what pickle raises for an item that can't be sent."""
        try:
            self.pipe.send(item)
        except OSError:
            raise self._died() from None

    def result(self) -> R:
        """Of the first item whose result has not been fetched."""
        try:
            reply = self.pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(reply, _Failure):
            raise reply.error()
        return reply[0]

    def _died(self) -> DataError:
        self.process.join(1)
        return DataError(
            f"a process that prepares rows has ended (exit code {self.process.exitcode}), perhaps for want of memory:"
            " set data.prepare_workers to fewer, or to 1."
        )


class _Pool(Generic[T, R]):
    def __init__(self, work: Callable[[T], R], processes: int) -> None:
        self._work, self._workers = work, list[_Worker[T, R]]()
        try:
            with _forking():
                for _ in range(processes):
                    self._workers.append(_Worker(work, [w.pipe for w in self._workers]))
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> _Pool[T, R]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.pipe.close()  # at which it ends, whatever it does
        for worker in self._workers:
            worker.process.join()

    def map(self, items: Iterable[T]) -> Iterator[R]:
        """The results in order."""
        pending: deque[Callable[[], R]] = deque()
        iterator = iter(items)
        for worker in itertools.cycle(self._workers):
            if len(pending) == _AHEAD * len(self._workers):
                yield pending.popleft()()
            try:
                item = next(iterator)
            except StopIteration:
                break
            except Exception:
                for result in pending:  # an item before this one may fail as well: that comes first
                    yield result()
                raise
            pending.append(self._started(worker, item))
        while pending:
            yield pending.popleft()()

    def _started(self, worker: _Worker[T, R], item: T) -> Callable[[], R]:
        try:
            worker.send(item)
        except _UNSENDABLE:
            return partial(self._work, item)
        return worker.result


@contextlib.contextmanager
def _forking() -> Iterator[None]:
    """Where processes are forked that use one thread each, without the warnings that are meant for other uses."""
    before = os.environ.get(_RUST_THREADS)
    os.environ[_RUST_THREADS] = "false"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        if before is None:
            del os.environ[_RUST_THREADS]
        else:
            os.environ[_RUST_THREADS] = before


# ---- in the other processes


def _serve(work: Callable[[Any], Any], pipe: Connection, others: list[Connection]) -> None:
    gc.freeze()  # what was there before stays shared: the collector would write to it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all, but the first process says when it ends
    for other in others:
        other.close()
    items: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, items), daemon=True).start()
    while True:
        _reply(pipe, work, items.get())


def _receive(pipe: Connection, items: queue.SimpleQueue[Any]) -> None:
    """Take what comes, so that whoever sends never waits for the work; end the process with the pipe."""
    try:
        while True:
            items.put(pipe.recv())
    except BaseException:  # noqa: BLE001  (closed, or something that can be pickled and not be made again)
        os._exit(1)


def _reply(pipe: Connection, work: Callable[[Any], Any], item: Any) -> None:
    try:
        reply: Any = (work(item),)
    except BaseException as error:  # noqa: BLE001  (raised again where the result is asked for)
        reply = _Failure(error)
    try:
        pipe.send(reply)
    except OSError:
        os._exit(1)
    except Exception as error:  # noqa: BLE001  (a result that can't be sent)
        pipe.send(_Failure(error))
