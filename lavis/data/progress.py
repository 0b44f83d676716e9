"""How far preparation is: a bar on a terminal, else a line in the log now and then."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from lavis.core.logging import process_rank
from lavis.data.sources import FileSource

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

log = logging.getLogger(__name__)

_AT_ONCE = 1.0
"""Seconds that need no bar."""
_LINES = 30.0
"""Seconds between lines of the log."""


class Progress:
    """Shows how much of a source has been prepared. Used as a context, at whose end the bar goes."""

    def __init__(self, source: FileSource) -> None:
        self._source, self._name = source, f"{source.name} {source.split}"
        self._rows, self._began = 0, time.monotonic()
        self._said, self._bar = self._began, None if process_rank() or not sys.stderr.isatty() else _bar(self._name)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, rows: int) -> None:
        """So many rows more are done."""
        self._rows += rows
        now = time.monotonic()
        if self._bar is not None:
            if now - self._began > _AT_ONCE:
                self._bar.start()
                self._bar.update(self._bar.task_ids[0], completed=self._share() * 100, rows=f"{self._rows:,} rows")
                self._bar.refresh()
        elif now - self._said > _LINES:
            self._said = now
            rate, share = self._rows / (now - self._began), self._share()
            part = f" ({share:.0%} of the files)" if share else ""
            log.info("%s: %s rows prepared%s, %.0f a second", self._name, f"{self._rows:,}", part, rate)

    def _share(self) -> float:
        """How much of the files has been read, a little more than what is done; 0 if that is not known."""
        total = sum(file.stat().st_size for file in self._source.files()) if self._source.bytes_read else 0
        return min(1.0, self._source.bytes_read / total) if total else 0.0


def _bar(name: str) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = ("preparing {task.description}", "{task.fields[rows]}")
    shown = [TextColumn(columns[0]), BarColumn(), TaskProgressColumn(), TextColumn(columns[1]), TimeRemainingColumn()]
    # refreshed by hand: a thread of its own would be there when processes are forked
    bar = Progress(*shown, console=Console(stderr=True), transient=True, auto_refresh=False)
    bar.add_task(name, total=100, rows="")
    return bar
