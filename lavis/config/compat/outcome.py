"""What a rule of translation yields."""

from __future__ import annotations

from typing import Any, NamedTuple


class Wrong(NamedTuple):
    """The value at the old `key` means nothing; `message` says why, and the fix."""

    key: str
    message: str


Outcome = tuple[str, Any, tuple[str, ...]] | Wrong
"""(new key, value, old keys it follows from), or what is wrong where there is nothing to translate to."""
