"""Errors a user can fix.

Each says what was wrong, where, and how to fix it; the commands print them without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LavisError(Exception):
    """Base of every error that bad input can cause. `exit_code` is what the commands end with."""

    exit_code = 1


class ConfigError(LavisError):
    """A recipe, an option or a default is wrong: unknown key, wrong type, impossible combination."""

    exit_code = 2


class RegistryError(LavisError, KeyError):
    """A name is unknown to a registry, or registered twice."""

    exit_code = 2

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


class DataError(LavisError):
    """An annotation file, a row or an image can't be used."""


class CheckpointError(LavisError):
    """A checkpoint or a weight file is missing, incomplete or belongs to something else."""


class DownloadError(LavisError):
    """A file can't be fetched, or is not what it should be."""


class TrainingError(LavisError):
    """Training can't go on: a non-finite loss or gradient, too many bad images, a lost rank."""


class ChatError(LavisError):
    """A question can't be answered: a wrong setting, too long a conversation, an image that can't be read."""


class BusyError(ChatError):
    """More questions wait than are taken."""


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """A hint naming the entries of `known` nearest to `name`, ready to append to a message; `""` when none is near."""
    near = difflib.get_close_matches(name, list(known), n=most, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
