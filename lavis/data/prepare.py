"""Preparation: the rows of an entry are validated, tokenised and measured once, into a table."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from lavis.core.errors import DataError
from lavis.core.paths import cache_root
from lavis.core.registries import DIALECTS
from lavis.core.types import Conversation, Document, Example, MediaRef, Message, Pair, RowError, Sample
from lavis.data.dialects import own_dialects
from lavis.data.files import OnError
from lavis.data.image import UNREADABLE, upright_size
from lavis.data.report import PrepareReport
from lavis.data.sources import FileSource, place_of
from lavis.data.table import FILE, REPORT, SCHEMA, PreparedTable, row_of
from lavis.tokens.caption import CaptionTemplate
from lavis.tokens.document import DocumentTemplate
from lavis.tokens.pairs import PairTemplate, PromptTemplate
from lavis.tokens.template import ChatTemplate

logger = logging.getLogger(__name__)

Template = ChatTemplate | CaptionTemplate | DocumentTemplate | PairTemplate | PromptTemplate
Share = tuple[float, float]
"""The rows whose place (see place_of) is not below the first number and below the second."""
ALL: Share = (0.0, 1.0)

FORMAT_VERSION = 2
"""Raised when the same inputs would give another table."""
_CHUNK = 1000
_THREADS = 8


def prepare(source: FileSource, template: Template, share: Share = ALL) -> PreparedTable:
    """The prepared table of a source's rows, or of a share of them; made under cache/prepared if it is not there yet.

    It is keyed by the contents of the files, the settings that matter and the template; processes that make the same
    table at the same time do not disturb each other. Bad rows are dropped and counted in its report.
    Raises DataError if the files cannot be read or no row can be used.
    """
    root = cache_root() / "prepared"
    folder = root / _fingerprint(source, template, share)
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".", dir=root))
        try:
            _write(work, source, template, share)
            _publish(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
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


def _fingerprint(source: FileSource, template: Template, share: Share) -> str:
    entry = source.entry
    settings = [FORMAT_VERSION, entry.format, asdict(entry.text), entry.kind, share, template.fingerprint()]
    if entry.generate:
        settings.append([entry.source, entry.generate])
    digest = hashlib.sha256(json.dumps(settings).encode())
    for file in _own_code(source):
        digest.update(file.read_bytes())
    media = getattr(template, "media", None)
    if media is not None and media.needs_size:  # then the table depends on the pictures too
        digest.update(str(source.image_root).encode())
    for file in source.files():
        with file.open("rb") as content:
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:32]


def _own_code(source: FileSource) -> list[Path]:
    """Python outside this package that rows go through: while it is written, it changes more often than the rows."""
    names = own_dialects() if source.entry.format == "auto" else [source.entry.format]
    kinds = [type(source), *(DIALECTS.get(name) for name in names)]
    modules = [sys.modules.get(kind.__module__) for kind in kinds if not kind.__module__.startswith("lavis.")]
    return [Path(file) for module in modules if (file := getattr(module, "__file__", None))]  # a notebook has none


def _write(folder: Path, source: FileSource, template: Template, share: Share) -> None:
    report = PrepareReport()
    with (folder / FILE).open("wb") as file:
        with pa.ipc.new_file(file, SCHEMA) as writer:
            # rows that cannot be read have no place: the uppermost share counts them
            on_error = report.drop if share[1] == 1.0 else lambda error: None
            rows = encoded(chosen(source, share, on_error), template, source.image_root, report)
            while chunk := list(islice(rows, _CHUNK)):
                writer.write_batch(pa.RecordBatch.from_pylist([row_of(*row) for row in chunk], schema=SCHEMA))
        file.flush()
        os.fsync(file.fileno())
    report.rows = report.kept + report.num_dropped
    if not report.kept:
        first = next((p.examples[0] for p in report.dropped.values()), "The files are empty.")
        files = ", ".join(map(str, source.files()))
        raise DataError(f"{files}: none of {report.rows} rows can be used. {first}")
    (folder / REPORT).write_text(json.dumps(asdict(report), ensure_ascii=False), encoding="utf-8")


def chosen(source: FileSource, share: Share, on_error: OnError | None = None) -> Iterator[Example]:
    """The source's rows of a share. Bad ones go to `on_error`; without one, the first is raised."""
    for example in source.examples(on_error):
        if share == ALL or share[0] <= place_of(example) < share[1]:
            yield example


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
