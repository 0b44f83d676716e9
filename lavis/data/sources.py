"""Sources: an entry of `data` in a recipe to rows, and rows to conversations, documents and pairs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

from lavis.config.schema import DataEntry
from lavis.core.errors import DataError, LavisError
from lavis.core.paths import resolve
from lavis.core.registries import SOURCES
from lavis.core.types import Conversation, Document, Example, MediaRef, Message, Pair, RowError
from lavis.data.dialects import detect, to_example
from lavis.data.dialects.turns import well_formed
from lavis.data.files import OnError, Row, read_rows, where_of
from lavis.data.text import text_processor

_TYPES: dict[str, type] = {"document": Document, "pair": Pair}
_KIND_OF: dict[type, str] = {Conversation: "conversation", Document: "document", Pair: "pair"}


@SOURCES.register("files")
class FileSource:
    """Annotation files of any dialect with an image folder.

    key: dotted key of the entry in the recipe, for messages. split: name of its results.
    A source of another kind overrides `files` (what its rows depend on), `rows` and `image_root`.
    """

    bytes_read = 0
    """How much of its files `rows` has read."""

    def __init__(self, entry: DataEntry, key: str, split: str) -> None:
        self.entry, self.key, self.split = entry, key, split
        self.name = entry.name or entry.source

    @classmethod
    def has_images(cls, entry: DataEntry) -> bool:
        """Whether rows of an entry may have images, so far as the recipe tells."""
        return entry.images is not None

    @property
    def image_root(self) -> Path | None:
        """Folder that relative image paths are under; None where paths are used as they are."""
        return resolve(self.entry.images) if self.entry.images else None

    def files(self) -> list[Path]:
        """Its files. Raises DataError for a missing one, saying where it belongs."""
        files = self.entry.files()
        if not files:
            raise DataError(f"{self.key}.path is empty: name the annotation file of {self.name!r}.")
        for path, url, _ in files:
            if not resolve(path).is_file():
                fetch = f"`lavis weights RECIPE --download` fetches it from {url}; else put it there"
                get = fetch if url else "Put it there"
                raise DataError(f"annotation file {resolve(path)} does not exist. {get}, or set {self.key}.path.")
        return [resolve(path) for path, _, _ in files]

    def rows(self, on_error: OnError | None = None) -> Iterator[tuple[str, Row]]:
        """Rows, each with the name by which messages call it. `on_error`: see read_rows."""
        before = 0
        for file in self.files():
            for number, row in read_rows(file, on_error, partial(self._note, before)):
                yield where_of(file, number), row
            before += file.stat().st_size

    def _note(self, before: int, count: int) -> None:
        self.bytes_read = before + count

    def examples(self, on_error: OnError | None = None) -> Iterator[Example]:
        """What the rows say, after the text processor.

        Bad rows go to `on_error`; without one, the first is raised as a RowError.
        """
        for where, row in self.rows(on_error):
            try:
                example = self.example(where, row)
            except RowError as error:
                if on_error is None:
                    raise
                on_error(error)
                continue
            yield example

    def example(self, where: str, row: Row) -> Example:
        """What the row that messages call `where` says, after the text processor. Raises RowError for a bad one."""
        return self._processed(self._checked(self._read(row, where), where), self._process)

    @cached_property
    def _process(self) -> Callable[[str], str]:
        return text_processor(self.entry.text)

    def _read(self, row: Row, where: str) -> Example:
        try:
            dialect = _detect(row, where, self.key) if self.entry.format == "auto" else self.entry.format
            return to_example(row, dialect, where=where)
        except LavisError:
            raise
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"
            raise RowError("the dialect fails", where, f"Change the row, or what reads {self.key}.", detail) from error

    def _checked(self, example: Example, where: str) -> Example:
        """The example in the form that all of its kind have."""
        wanted = _TYPES.get(self.entry.kind, Conversation)
        if not isinstance(example, wanted):
            if type(example) not in _KIND_OF:
                raise RowError(f"the dialect gives a {type(example).__name__}, no example", where, "Correct it.")
            kind = _KIND_OF[type(example)]
            fix = f"Set {self.key}.kind to {kind}, or give rows of kind {self.entry.kind}."
            raise RowError(f"the row is a {kind}, not a {self.entry.kind}", where, fix)
        if isinstance(example, Document):
            return example
        form = partial(well_formed, where=where, answered=self.entry.kind != "prompt")
        return example.map(form) if isinstance(example, Pair) else form(example)

    def _processed(self, example: Example, process: Callable[[str], str]) -> Example:
        """With the processor applied to questions (or captions, or documents)."""
        if isinstance(example, Document):
            return replace(example, text=process(example.text))
        role = "assistant" if self.entry.kind == "caption" else "user"

        def change(c: Conversation) -> Conversation:
            return replace(c, messages=tuple(_map_text(m, process) if m.role == role else m for m in c.messages))

        return example.map(change) if isinstance(example, Pair) else change(example)


def has_images(entry: DataEntry) -> bool:
    """Whether rows of an entry may have images, so far as the recipe tells."""
    return SOURCES.get(entry.source).has_images(entry)


def place_of(example: Example) -> float:
    """A number in [0, 1) by which rows are divided between training and validation.

    It depends on the pictures, else on the text: rows about the same picture, and equal rows, are on the same side.
    """
    if isinstance(example, Document):
        content: object = example.text
    else:
        conversation = example.chosen if isinstance(example, Pair) else example
        content = conversation.images or [(m.role, m.text) for m in conversation.messages]
    digest = hashlib.sha256(json.dumps(content).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _detect(row: Row, where: str, key: str) -> str:
    try:
        return detect(row)
    except DataError as error:
        raise RowError("unknown annotation dialect", where, f"Set {key}.format.", str(error)) from None


def _map_text(message: Message, process: Callable[[str], str]) -> Message:
    """`process` applied to the last text of a message, behind the space that may part it from a picture."""
    last = max((i for i, part in enumerate(message.parts) if isinstance(part, str)), default=None)
    if last is None:
        return message
    text = message.parts[last]
    assert isinstance(text, str)
    behind_picture = last > 0 and isinstance(message.parts[last - 1], MediaRef) and text.startswith(" ")
    text = " " + process(text[1:]) if behind_picture else process(text)
    return replace(message, parts=(*message.parts[:last], text, *message.parts[last + 1 :]))
