"""Preparation: the rows of an entry are validated, tokenised and measured once, into a table."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from lavis.core.errors import DataError
from lavis.core.paths import cache_root
from lavis.core.types import Conversation, Document, Example, MediaRef, Message, Pair, RowError, Sample
from lavis.data.files import OnError, Row
from lavis.data.fingerprint import ALL, Share, TableKey, Template
from lavis.data.image import UNREADABLE, upright_size
from lavis.data.pool import ordered_map
from lavis.data.progress import Progress
from lavis.data.report import PrepareReport, Problems
from lavis.data.sources import FileSource, place_of
from lavis.data.table import FILE, REPORT, SCHEMA, PreparedTable, record_batch, row_of
from lavis.tokens.document import DocumentTemplate

logger = logging.getLogger(__name__)

_CHUNK = 1000
_THREADS = 8


def prepare(source: FileSource, template: Template, share: Share = ALL, processes: int = 1) -> PreparedTable:
    """The prepared table of a source's rows, or of a share of them; made under cache/prepared if it is not there yet,
    by so many processes: the table is the same, bit for bit, for any number.

    It is keyed by the contents of the files, the settings that matter and the template (see TableKey); processes
    that make the same table at the same time do not disturb each other. Bad rows are dropped and counted in its report.
    Raises DataError if the files cannot be read or no row can be used.
    """
    root = cache_root() / "prepared"
    key = TableKey(root, source, template, share)
    folder = key.folder()
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".", dir=root))
        try:
            _write(work, source, template, share, processes)
            _publish(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    key.remember(folder)
    table = PreparedTable(folder, source.image_root)
    logger.info("%s %s: %s", source.name, source.split, table.report.summary())
    return table


def sized(examples: Sequence[Example], template: Template, root: Path | None, on_error: OnError) -> list[Example]:
    """The examples with the sizes of their pictures, where the template needs these; those that have a picture whose
    size cannot be read are left out and go to `on_error`.
    """
    media = getattr(template, "media", None)
    if media is None or not media.needs_size:
        return list(examples)
    refs = list({ref.path: ref for example in examples for ref in example.media})
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = dict(zip(refs, pool.map(partial(_size, root or Path()), refs), strict=True))
    found: list[Example] = []
    for example in examples:
        unread = next((ref.path for ref in example.media if isinstance(sizes[ref.path], str)), None)
        if unread is None:
            found.append(_with_sizes(example, sizes))
        else:
            fix = "Put the image there, or drop the row."
            on_error(RowError("an image's size cannot be read", example.id, fix, f"{unread}: {sizes[unread]}"))
    return found


def _size(root: Path, path: str) -> tuple[int, int] | str:
    """Size of a picture, or why it has none."""
    try:
        return upright_size(root / path)
    except UNREADABLE as error:
        return str(error)


def _with_sizes(example: Example, sizes: dict[str, Any]) -> Example:
    def part(p: str | MediaRef) -> str | MediaRef:
        return p if isinstance(p, str) else replace(p, size=sizes[p.path])

    def message(m: Message) -> Message:
        return replace(m, parts=tuple(map(part, m.parts)))

    def conversation(c: Conversation) -> Conversation:
        return replace(c, messages=tuple(map(message, c.messages)))

    if isinstance(example, Document):
        return example
    return example.map(conversation) if isinstance(example, Pair) else conversation(example)


class _Unread(NamedTuple):
    """A row that could not be read from its file."""

    reason: str
    message: str


Item = tuple[str, Row] | Example | _Unread
"""A row with its name; what it says, where the source makes that itself."""


class _Piece(NamedTuple):
    """What became of some rows: their part of the table, or the ids and tokens of their documents."""

    report: PrepareReport
    batch: pa.RecordBatch | None
    documents: list[tuple[str, list[int]]]


def _write(folder: Path, source: FileSource, template: Template, share: Share, processes: int) -> None:
    report = PrepareReport()
    pieces = ordered_map(partial(_encode, source, template, share), _pieces(source), processes)
    with closing(pieces), Progress(source) as progress, (folder / FILE).open("wb") as file:
        with pa.ipc.new_file(file, SCHEMA) as writer:
            for batch in _batches(pieces, template, report, progress):
                writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())
    report.rows = report.kept + report.num_dropped
    if not report.kept:
        first = next((p.examples[0] for p in report.dropped.values()), "The files are empty.")
        files = ", ".join(map(str, source.files()))
        raise DataError(f"{files}: none of {report.rows} rows can be used. {first}")
    (folder / REPORT).write_text(json.dumps(asdict(report), ensure_ascii=False), encoding="utf-8")


def _pieces(source: FileSource) -> Iterator[list[Item]]:
    """The source's rows, so many at a time as are worth a step."""
    piece: list[Item] = []

    def note(error: RowError) -> None:
        piece.append(_Unread(error.reason, str(error)))

    makes_examples = type(source).examples is not FileSource.examples
    for item in source.examples(note) if makes_examples else source.rows(note):
        piece.append(item)
        if len(piece) >= _CHUNK:
            yield piece
            piece = []
    if piece:
        yield piece


def _encode(source: FileSource, template: Template, share: Share, items: Sequence[Item]) -> _Piece:
    report = PrepareReport(rows=len(items))
    examples = _examples(source, share, items, report)
    if isinstance(template, DocumentTemplate):
        return _Piece(report, None, list(template.tokens(_counted(examples, report))))
    rows = [row_of(*row) for row in encoded(examples, template, source.image_root, report)]
    return _Piece(report, record_batch(rows) if rows else None, [])


def _examples(source: FileSource, share: Share, items: Iterable[Item], report: PrepareReport) -> Iterator[Example]:
    # rows that cannot be read have no place: the uppermost share counts them
    unread = report if share[1] == 1.0 else PrepareReport()
    for item in items:
        if isinstance(item, _Unread):
            unread.add(item.reason, Problems(1, [item.message]))
            continue
        try:
            example = source.example(*item) if isinstance(item, tuple) else item
        except RowError as error:
            unread.drop(error)
            continue
        if _is_in(share, example):
            yield example


def _batches(
    pieces: Iterable[_Piece], template: Template, report: PrepareReport, progress: Progress
) -> Iterator[pa.RecordBatch]:
    def noted() -> Iterator[_Piece]:
        for piece in pieces:
            report.merge(piece.report)
            progress.step(piece.report.rows)
            yield piece

    if not isinstance(template, DocumentTemplate):
        yield from (piece.batch for piece in noted() if piece.batch is not None)
        return
    blocks = template.cut(document for piece in noted() for document in piece.documents)
    while chunk := list(islice(blocks, _CHUNK)):
        yield record_batch([row_of(block, None, names) for block, names in chunk])


def chosen(source: FileSource, share: Share, on_error: OnError | None = None) -> Iterator[Example]:
    """The source's rows of a share. Bad ones go to `on_error`; without one, the first is raised."""
    for example in source.examples(on_error):
        if _is_in(share, example):
            yield example


def _is_in(share: Share, example: Example) -> bool:
    return share == ALL or share[0] <= place_of(example) < share[1]


Encoded = tuple[Sample, "Sample | None", "Example | list[str]"]
"""A sample, of a pair the rejected one too, and what it was made of."""


def encoded(
    examples: Iterable[Example], template: Template, root: Path | None, report: PrepareReport
) -> Iterator[Encoded]:
    """The samples of `examples`; what became of each of these is counted in `report`."""
    if isinstance(template, DocumentTemplate):
        for block, names in template.blocks(_counted(examples, report)):
            yield block, None, names
        return
    iterator = iter(examples)
    while chunk := list(islice(iterator, _CHUNK)):
        chunk = sized(chunk, template, root, report.drop)
        results: Any = template.encode_many(chunk)  # type: ignore[arg-type]
        for example, result in zip(chunk, results, strict=True):
            if isinstance(result, RowError):
                report.drop(result)
                continue
            report.kept += 1
            yield (*(result if isinstance(result, tuple) else (result, None)), example)


def _counted(examples: Iterable[Example], report: PrepareReport) -> Iterator[Document]:
    for example in examples:
        assert isinstance(example, Document)
        report.kept += 1
        yield example


def _publish(work: Path, folder: Path) -> None:
    """Rename the finished table to its place, unless another process was faster."""
    work.chmod(0o755)  # mkdtemp makes it private
    try:
        work.rename(folder)
    except OSError:
        if not folder.exists():
            raise
