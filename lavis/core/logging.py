"""Log output of the commands: lines on stderr from rank 0, warnings of all ranks, a copy in the run's folder."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path

LOGGER_NAME = "lavis"
"""Root of the program's loggers; modules take `logging.getLogger(__name__)` below it."""


def process_rank() -> int:
    """Rank of this process as the launcher set it in `$RANK`, 0 without one. Known before process groups exist."""
    return int(os.environ.get("RANK", "0"))


def setup_logging(level: int = logging.INFO, file: Path | None = None) -> None:
    """Send the program's log lines to stderr and, on rank 0, to `file` as well.

    Ranks above 0 write warnings and errors only, marked with the rank. Calling it again replaces the handlers, so a run
    can add its file once its folder is known.
    """
    rank = process_rank()
    logger = logging.getLogger(LOGGER_NAME)
    logger.setLevel(level if rank == 0 else max(level, logging.WARNING))
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if file is not None and rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
    where = "" if rank == 0 else f"[rank {rank}] "
    for handler in handlers:
        handler.setFormatter(logging.Formatter(f"%(asctime)s {where}%(levelname)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning the first time `message` is given; on rank 0 only, since all ranks read the same recipe."""
    if process_rank() == 0:
        logging.getLogger(LOGGER_NAME).warning(message)


@functools.cache
def info_once(message: str) -> None:
    """As `warn_once`, for what needs no action."""
    if process_rank() == 0:
        logging.getLogger(LOGGER_NAME).info(message)
