"""Dialects of annotations: what a row of a file looks like, and what it becomes.

A dialect is a class registered by name in DIALECTS; a file of one's own adds one:

    @DIALECTS.register("mine")
    class Mine:
        @staticmethod
        def matches(row): return "question" in row
        @staticmethod
        def read(row, where): return Conversation((Message("user", (row["question"],)), ...))
"""

from __future__ import annotations

from typing import Protocol

from lavis.core.errors import DataError
from lavis.core.registries import DIALECTS
from lavis.core.types import Conversation, Example, RowError
from lavis.data.dialects.turns import well_formed
from lavis.data.files import Row

ORDER = ("preference", "messages", "llava", "sharegpt", "alpaca", "minigpt4qwen", "prompt", "text")
"""Those of this package in the order in which rows are tried; a user's own are tried before them."""


class Dialect(Protocol):
    """How rows of one kind are written."""

    @staticmethod
    def matches(row: Row) -> bool:
        """Whether a row is written in it, judged by its keys."""

    @staticmethod
    def read(row: Row, where: str) -> Example:
        """What the row says; `where` names it in messages.

        Turns need not be checked: afterwards they are brought to the form that `well_formed` describes.
        Raises RowError saying what is wrong, where, and the fix.
        """


def own_dialects() -> list[str]:
    """Names of those that are not of this package."""
    return [name for name in DIALECTS.list() if name not in ORDER]


def detect(row: Row) -> str:
    """The dialect a row is written in, by its keys. Raises DataError when it is none that is known."""
    own = own_dialects()
    for name in (*own, *ORDER):
        if DIALECTS.get(name).matches(row):
            return name
    raise DataError(
        f"no known annotation dialect has the keys {sorted(row)}. Known: 'instruction' + 'output' (minigpt4qwen,"
        " alpaca), 'conversations' (llava, sharegpt), 'messages' (OpenAI), 'chosen' + 'rejected' (preference),"
        f" 'prompt', 'text'{''.join(f', {name}' for name in own)}."
    )


def to_example(row: Row, name: str, *, where: str) -> Example:
    """Read a row of the dialect `name`. `where` names the row in messages. Raises RowError (a DataError)."""
    if "video" in row or "videos" in row:
        raise RowError("the row refers to a video", where, "Videos are not supported: give single frames as images.")
    return DIALECTS.get(name).read(row, where)


def to_conversation(row: Row, name: str, *, where: str) -> Conversation:
    """As `to_example` for a row that is a conversation, in the form that `well_formed` describes."""
    example = to_example(row, name, where=where)
    if not isinstance(example, Conversation):
        kind = type(example).__name__.lower()
        raise RowError(f"the row is a {kind}, not a conversation", where, f"Set `kind: {kind}` for these files.")
    return well_formed(example, where)
