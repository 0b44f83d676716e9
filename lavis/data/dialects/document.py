"""Running text: `{"text": "..."}`."""

from __future__ import annotations

from lavis.core.registries import DIALECTS
from lavis.core.types import Document, RowError
from lavis.data.dialects.values import labels_of, text_of
from lavis.data.files import Row


@DIALECTS.register("text")
class Text:
    """One document a row, learned as a whole."""

    @staticmethod
    def matches(row: Row) -> bool:
        return "text" in row

    @staticmethod
    def read(row: Row, where: str) -> Document:
        text = text_of(row.get("text"), "text", where)
        if not text.strip():
            raise RowError("a document is empty", where, "Fill or delete it.")
        return Document(text, labels_of(row, where)["id"])
