"""The rows of a JSON list, one after the other: the file is never in memory as a whole."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from lavis.core.errors import DataError

OnBytes = Callable[[int], None]
"""Told from time to time how many bytes of a file have been read."""

BLOCK = 1 << 20
"""Characters that are read at once."""
_SPACE = re.compile(r"[ \t\n\r]*")
_DELIMITED = '{["'
"""What a value begins with that says itself where it ends."""
_LONGEST_TOKEN = 16
"""Characters before the end of what has been read in which an error may come from what has not: -Infinity, \\ud83d."""


def begins_with_object(path: Path) -> bool:
    """Whether the first thing in the file is an object: then it holds one a line, in spite of its name."""
    with _opened(path) as file:
        text = _read(file, path, BLOCK)
        while text and not text.lstrip():
            text = _read(file, path, BLOCK)
    return text.lstrip().startswith("{")


def read_json_list(path: Path, on_bytes: OnBytes | None = None) -> Iterator[Any]:
    """What a JSON list holds, in order.

    Raises DataError where the file goes wrong, with what `json.load` says of it: its line and column. What stands
    before has been given by then.
    """
    with _opened(path) as file:
        window = _Window(path, file, on_bytes)
        window.skip_space()
        if window.next != "[":
            rows = window.rest()
            raise DataError(f"{path}: holds a {type(rows).__name__}, not a list of rows. Put the rows in a JSON list.")
        window.skip()
        if window.next != "]":
            yield window.value()
            while window.next == ",":
                yield window.value_behind_comma()
        window.close()


class _Window:
    """The part of the file that is in memory: what is behind `at` has not been understood yet."""

    def __init__(self, path: Path, file: TextIO, on_bytes: OnBytes | None) -> None:
        self._path, self._file, self._on_bytes = path, file, on_bytes
        self._decode = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False
        self._lines, self._columns = 0, 0
        """Line breaks before the window, and characters between the last of them and the window."""

    @property
    def next(self) -> str:
        """The next character; empty at the end of the file."""
        return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Go past a character and the space behind it."""
        self._at += 1
        self.skip_space()

    def skip_space(self) -> None:
        """Go on to what is no space."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found
            self._at = found.end()
            if self._at < len(self._text) or not self._more(BLOCK):
                return

    def value(self) -> Any:
        """The value that begins here; then the space behind it is skipped."""
        size = BLOCK
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _LONGEST_TOKEN
                if not (cut_off and self._more(size)):
                    raise self._error(error.msg, error.pos) from None
            else:
                # a number may go on in the next block, and what looks like its end may be a part of it
                if self.next in _DELIMITED or end < len(self._text) - _LONGEST_TOKEN or not self._more(size):
                    self._at = end
                    self.skip_space()
                    return value
            size *= 2  # so that a long row is not read again and again from its beginning

    def value_behind_comma(self) -> Any:
        """The value behind the comma that is next."""
        found = _SPACE.match(self._text, self._at + 1)
        while found and found.end() == len(self._text) and self._more(BLOCK):
            found = _SPACE.match(self._text, self._at + 1)
        assert found
        if self._text[found.end() : found.end() + 1] == "]":
            self._refuse(found.end() + 1)
        self._at = found.end()
        return self.value()

    def close(self) -> None:
        """Go past the bracket that is next. Raises DataError if another thing is next, or if anything follows."""
        if self.next != "]":
            self._refuse(self._at + 1)
        self.skip()
        if self.next:
            raise self._error("Extra data", self._at)
        if self._on_bytes:
            self._on_bytes(self._path.stat().st_size)

    def rest(self) -> Any:
        """All that is left as one value. Raises DataError if it is none."""
        while self._more(BLOCK):
            pass
        try:
            return json.loads(self._text[self._at :])
        except json.JSONDecodeError as error:
            raise self._error(error.msg, self._at + error.pos) from None

    def _refuse(self, end: int) -> None:
        """Raise what Python's own reader says of the text up to `end` behind a value; versions differ in that."""
        before = '[""'
        try:
            json.loads(before + self._text[self._at : end])
        except json.JSONDecodeError as error:
            raise self._error(error.msg, self._at + error.pos - len(before)) from None
        raise AssertionError("no error")

    def _more(self, size: int) -> bool:
        """Read on, and forget what is before `at`; False at the end of the file."""
        if self._ended:
            return False
        block = _read(self._file, self._path, size)
        if self._on_bytes:
            self._on_bytes(self._file.buffer.tell())
        if not block:
            self._ended = True
            return False
        breaks = self._text.count("\n", 0, self._at)
        line = self._at - (self._text.rfind("\n", 0, self._at) + 1)
        self._lines, self._columns = self._lines + breaks, line if breaks else self._columns + self._at
        self._text, self._at = self._text[self._at :] + block, 0
        return True

    def _error(self, message: str, position: int) -> DataError:
        line = self._lines + self._text.count("\n", 0, position) + 1
        column = position - self._text.rfind("\n", 0, position)
        column += self._columns if line == self._lines + 1 else 0
        return DataError(f"{self._path}, line {line}, column {column}: bad JSON ({message}). Correct the file.")


def _opened(path: Path) -> TextIO:
    return path.open(encoding="utf-8-sig")


def _read(file: TextIO, path: Path, size: int) -> str:
    try:
        return file.read(size)
    except UnicodeDecodeError:
        raise not_utf8(path) from None


def not_utf8(path: Path) -> DataError:
    """What is said of a file whose bytes are no UTF-8 text."""
    decoder, before = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while True:
            block = file.read(BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                where = before - pending + error.start
                return DataError(f"{path}: is not UTF-8 text (byte {where}). Save the file as UTF-8.")
            before += len(block)
            if not block:
                return DataError(f"{path}: is not UTF-8 text. Save the file as UTF-8.")
