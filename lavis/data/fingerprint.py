"""What a prepared table is known by: a digest of all that decides what is in it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from lavis.core.registries import DIALECTS
from lavis.data.dialects import own_dialects
from lavis.data.sources import FileSource
from lavis.tokens.caption import CaptionTemplate
from lavis.tokens.document import DocumentTemplate
from lavis.tokens.pairs import PairTemplate, PromptTemplate
from lavis.tokens.template import ChatTemplate

Template = ChatTemplate | CaptionTemplate | DocumentTemplate | PairTemplate | PromptTemplate
Share = tuple[float, float]
"""The rows whose place (see place_of) is not below the first number and below the second."""
ALL: Share = (0.0, 1.0)

FORMAT_VERSION = 2
"""Raised when the same inputs would give another table."""
_MARK = ".seen"
_SAMPLES, _SAMPLE = 16, 1 << 16
"""Pieces of a file that are looked at, from its beginning to its end, and bytes of each: together 1 MiB."""


class TableKey:
    """By what the table of a source's rows, or of a share of them, is found under `root`.

    The table's folder is named after a digest of the settings that matter, the template and all that is in the files.
    To read these at every start would take longer than all else, so the folder also holds empty files, each named after
    a digest of what the files looked like from outside once: size, times, and a sample of their contents. If none fits,
    the files are read, and are found unchanged where they were only touched or moved.
    """

    def __init__(self, root: Path, source: FileSource, template: Template, share: Share) -> None:
        self._root, self._files = root, source.files()
        self._settings = _settings(source, template, share)
        self._mark = f"{self._digest(_outside)}{_MARK}"

    def folder(self) -> Path:
        """Where the table is, or belongs."""
        marks = self._root.glob(f"*/{self._mark}")
        known = next((mark.parent for mark in marks if not mark.parent.name.startswith(".")), None)
        return known or self._root / self._digest(_inside)

    def remember(self, folder: Path) -> None:
        """Let the table in `folder` be found without reading the files."""
        with contextlib.suppress(OSError):  # of a cache that cannot be written
            (folder / self._mark).touch()

    def _digest(self, look: Callable[[Path], Iterator[bytes]]) -> str:
        digest = self._settings.copy()
        for file in self._files:
            for part in look(file):
                digest.update(part)
        return digest.hexdigest()[:32]


def _inside(file: Path) -> Iterator[bytes]:
    with file.open("rb") as content:
        yield f"{file.name} {file.stat().st_size}".encode()
        while block := content.read(1 << 20):
            yield block


def _outside(file: Path) -> Iterator[bytes]:
    """What a change of the file changes: the time of the last change of its entry can't be set back, but on Windows."""
    seen = file.stat()
    yield f"{file} {seen.st_size} {seen.st_mtime_ns} {seen.st_ctime_ns}".encode()
    with file.open("rb") as content:
        for i in range(_SAMPLES):
            content.seek(i * max(0, seen.st_size - _SAMPLE) // (_SAMPLES - 1))
            yield content.read(_SAMPLE)


def _settings(source: FileSource, template: Template, share: Share) -> hashlib._Hash:
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
    return digest


def _own_code(source: FileSource) -> list[Path]:
    """Python outside this package that rows go through: while it is written, it changes more often than the rows."""
    names = own_dialects() if source.entry.format == "auto" else [source.entry.format]
    kinds = [type(source), *(DIALECTS.get(name) for name in names)]
    modules = [sys.modules.get(kind.__module__) for kind in kinds if not kind.__module__.startswith("lavis.")]
    return [Path(file) for module in modules if (file := getattr(module, "__file__", None))]  # a notebook has none
