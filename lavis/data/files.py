"""Annotation files of every kind to rows."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from lavis.core.errors import DataError
from lavis.core.types import RowError
from lavis.data.json_rows import OnBytes, begins_with_object, not_utf8, read_json_list

Row = dict[str, Any]
OnError = Callable[[RowError], None]

_JSON_COLUMNS = frozenset(
    ["conversations", "messages", "image", "images", "instruction", "output", "prompt", "chosen", "rejected"]
)
"""Columns of a CSV file whose cells may hold a list, or an object, in JSON."""


def read_rows(
    path: Path, on_error: OnError | None = None, on_bytes: OnBytes | None = None
) -> Iterator[tuple[int, Row]]:
    """Rows of a JSON list, JSONL, CSV or Parquet file with their numbers, counted from 1 (JSONL: the line).

    They are read as they are asked for: of a file of any size a few are in memory.
    A row that cannot be read goes to `on_error`, which may keep it for a report; without one it is raised.
    Raises DataError, naming file and line, where the file cannot be read any further.
    """
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: annotation files end in {', '.join(readers)}. Rename or convert the file.")
    for number, row in reader(path, on_bytes or _ignored):
        if isinstance(row, dict):
            # A missing value is spelled null in Parquet and JSON, and left empty in CSV.
            yield number, {key: value for key, value in row.items() if value is not None}
            continue
        error = row if isinstance(row, RowError) else _not_an_object(path, number, row)
        if on_error is None:
            raise error
        on_error(error)


def where_of(path: Path, number: int) -> str:
    """How messages name a row."""
    return f"{path.name} row {number}"


def _not_an_object(path: Path, number: int, row: Any) -> RowError:
    fix = 'Write each row as {"key": value, ...}.'
    return RowError("the row is not a JSON object", where_of(path, number), fix, type(row).__name__)


def _ignored(count: int) -> None:
    pass


def _read_json(path: Path, on_bytes: OnBytes) -> Iterable[tuple[int, Any]]:
    if begins_with_object(path):  # one object a line, in spite of the name
        return _read_jsonl(path, on_bytes)
    return enumerate(read_json_list(path, on_bytes), start=1)


def _read_jsonl(path: Path, on_bytes: OnBytes) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(_lines(lines, path, on_bytes), start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                where = f"{path}, line {number}, column {error.colno}"
                yield number, RowError("bad JSON", where, "Correct or delete the line.", error.msg)


def _lines(file: TextIO, path: Path, on_bytes: OnBytes) -> Iterator[str]:
    try:
        for line in file:
            yield line
            on_bytes(file.buffer.tell())
    except UnicodeDecodeError:
        raise not_utf8(path) from None


def _read_csv(path: Path, on_bytes: OnBytes) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(_lines(file, path, on_bytes)), start=1):
            if None in row or None in row.values():
                fix = "Quote cells that hold commas or line breaks."
                yield number, RowError("cells do not match the header", where_of(path, number), fix)
                continue
            yield number, {key: _cell(key, value) for key, value in row.items() if value != ""}


def _cell(key: str, text: str) -> Any:
    """A cell of a column that may hold JSON: what its JSON says, else the text."""
    if key not in _JSON_COLUMNS or not text.startswith(("[", "{")):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _read_parquet(path: Path, on_bytes: OnBytes) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, size = 0, path.stat().st_size
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
                on_bytes(size * number // max(1, file.metadata.num_rows))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}). Write the file again.") from None
