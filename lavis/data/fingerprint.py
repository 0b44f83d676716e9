"""What a prepared table is known by: a digest of all that decides what is in it."""

from __future__ import annotations

import hashlib
import json
import sys
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


def fingerprint(source: FileSource, template: Template, share: Share) -> str:
    """Hex digest of the files' contents, the settings that matter and the template."""
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
