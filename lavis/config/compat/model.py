"""Older spellings of the `model` part of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

RENAMES: dict[str, str] = {}
"""Old dotted key to new one, value unchanged."""
CONSUMED: tuple[str, ...] = ()
"""Old dotted keys that `rules` reads; they are removed afterwards."""


def rules(values: Mapping[str, Any]) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """(new key, value, old keys it follows from) of what more than one old key says, from the merged layers."""
    yield from ()
