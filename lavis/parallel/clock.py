"""How long the phases of a step take, without waiting for a GPU to find out."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """`with clock("forward"): ...` adds up the seconds of a phase: on a GPU between marks in its queue of work, on a
    CPU by the clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._queued = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self._queued:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._marks.append((phase, begin, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last call; what a GPU has not done yet counts in the next one."""
        done = [mark for mark in self._marks if mark[2].query()]
        self._marks = self._marks[len(done) :]
        for phase, begin, end in done:
            self._seconds[phase] += begin.elapsed_time(end) / 1000
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds
