"""What a rule of translation yields where there is nothing to translate to."""

from __future__ import annotations

from typing import NamedTuple


class Wrong(NamedTuple):
    """The value at the old `key` means nothing; `message` says why, and the fix."""

    key: str
    message: str
