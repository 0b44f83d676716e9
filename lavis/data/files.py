"""Annotation files of every kind to rows."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lavis.core.errors import DataError
from lavis.core.types import RowError

Row = dict[str, Any]
OnError = Callable[[RowError], None]

_JSON_COLUMNS = frozenset(
    ["conversations", "messages", "image", "images", "instruction", "output", "prompt", "chosen", "rejected"]
)
"""Columns of a CSV file whose cells may hold a list, or an object, in JSON."""


def read_rows(path: Path, on_error: OnError | None = None) -> Iterator[tuple[int, Row]]:
    """Rows of a JSON list, JSONL, CSV or Parquet file with their numbers, counted from 1 (JSONL: the line).

    A row that cannot be read goes to `on_error`, which may keep it for a report; without one it is raised.
    Raises DataError, naming file and line, when the file as a whole cannot be read.
    """
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: annotation files end in {', '.join(readers)}. Rename or convert the file.")
    for number, row in reader(path):
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


def _read_json(path: Path) -> Iterable[tuple[int, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start}). Save the file as UTF-8.") from None
    if text.lstrip().startswith("{"):  # one object a line, in spite of the name
        return _read_jsonl(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: bad JSON ({error.msg}). Correct the file."
        ) from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds a {type(rows).__name__}, not a list of rows. Put the rows in a JSON list.")
    return enumerate(rows, start=1)


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                where = f"{path}, line {number}, column {error.colno}"
                yield number, RowError("bad JSON", where, "Correct or delete the line.", error.msg)


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=1):
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


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}). Write the file again.") from None
