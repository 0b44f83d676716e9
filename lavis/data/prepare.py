"""Preparation: a split is validated, tokenised and measured once, into an Arrow table that workers memory-map."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from lavis.core.errors import DataError
from lavis.core.paths import cache_root
from lavis.core.types import Conversation, ImageRef, Message, RowError, Sample
from lavis.data.builders import InstructionBuilder
from lavis.tokens.template import CaptionTemplate, ChatTemplate

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Raised when the same inputs would give another table."""
EXAMPLES = 5
"""Messages kept for each kind of problem."""
_CHUNK = 1000
_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "images": pa.list_(pa.string()),
        "length": pa.int32(),
        "num_tokens": pa.int32(),
        "conversation": pa.string(),
    }
)


@dataclass
class Problems:
    """Rows with one kind of problem: how many, and what the first ones' errors say."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class PrepareReport:
    """What became of the rows of a split. `dropped` is by kind of problem."""

    rows: int = 0
    kept: int = 0
    dropped: dict[str, Problems] = field(default_factory=dict)

    def drop(self, error: RowError) -> None:
        """Count a row that can't be used."""
        problems = self.dropped.setdefault(error.reason, Problems())
        problems.count += 1
        if len(problems.examples) < EXAMPLES:
            problems.examples.append(str(error))

    @property
    def num_dropped(self) -> int:
        """Rows that can't be used."""
        return sum(p.count for p in self.dropped.values())

    def summary(self) -> str:
        """One line: rows kept, and dropped by kind of problem."""
        kinds = ", ".join(f"{p.count} x {reason}" for reason, p in self.dropped.items())
        return f"{self.kept} of {self.rows} rows kept" + (f"; dropped: {kinds}" if kinds else "")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrepareReport:
        """What `dataclasses.asdict` made of one."""
        dropped = {reason: Problems(**p) for reason, p in values["dropped"].items()}
        return cls(values["rows"], values["kept"], dropped)


class PreparedTable:
    """A prepared split, memory-mapped from `folder`. Pickles as its path, so workers of any start method can have it.

    image_root: folder that relative image paths are under.
    """

    def __init__(self, folder: Path, image_root: Path | None) -> None:
        self.folder, self.image_root = folder, image_root
        self._table = pa.ipc.open_file(pa.memory_map(str(folder / "table.arrow"))).read_all()
        self.lengths: np.ndarray = self._table["length"].to_numpy()
        """int32 [n]: tokens of each sample, images included."""
        self.num_tokens: np.ndarray = self._table["num_tokens"].to_numpy()
        """int32 [n]: supervised tokens of each sample."""
        self.num_images: np.ndarray = pa.compute.list_value_length(self._table["images"]).to_numpy()
        """int32 [n]: images of each sample."""

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedTable, (self.folder, self.image_root)

    def __len__(self) -> int:
        return self._table.num_rows

    @cached_property
    def report(self) -> PrepareReport:
        """What became of the rows at preparation."""
        return PrepareReport.from_dict(json.loads((self.folder / "report.json").read_text(encoding="utf-8")))

    def sample(self, index: int) -> Sample:
        """Sample `index`; its image paths are absolute where there is an image folder."""
        ids, labels = (tuple(self._table[c][index].values.to_numpy().tolist()) for c in ("input_ids", "labels"))
        return Sample(ids, labels, tuple(self.image_path(p) for p in self._table["images"][index].as_py()))

    def conversation(self, index: int) -> Conversation:
        """The conversation that sample `index` was made of, with image paths as in the annotations."""
        values = json.loads(self._table["conversation"][index].as_py())
        messages = [
            Message(role, tuple(p if isinstance(p, str) else ImageRef(p[0]) for p in parts))
            for role, parts in values.pop("messages")
        ]
        return Conversation(tuple(messages), **values)

    def image_paths(self) -> list[str]:
        """Every image of the table once, absolute if there is an image folder."""
        return [
            self.image_path(p) for p in pa.compute.unique(self._table["images"].combine_chunks().flatten()).to_pylist()
        ]

    def image_path(self, path: str) -> str:
        """An image path of an annotation, absolute if there is an image folder."""
        return str(self.image_root / path) if self.image_root else path


def prepare(
    builder: InstructionBuilder, split: str, template: ChatTemplate | CaptionTemplate, *, sample_format: str
) -> PreparedTable:
    """The prepared table of a split; made under cache/prepared if it is not there yet.

    It is keyed by the contents of the annotation files, the settings that matter and the template; processes that make
    the same
    table at the same time do not disturb each other. Bad rows are dropped and counted in its report.
    Raises DataError if the files can't be read or no row can be used.
    """
    root = cache_root() / "prepared"
    folder = root / _fingerprint(builder, split, template, sample_format)
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".", dir=root))
        try:
            _write(work, builder, split, template)
            _publish(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    table = PreparedTable(folder, builder.image_root)
    logger.info("%s %s: %s", builder.name, split, table.report.summary())
    return table


def _fingerprint(
    builder: InstructionBuilder, split: str, template: ChatTemplate | CaptionTemplate, sample_format: str
) -> str:
    config = builder.config
    text = config.text_processor.train if split == "train" else config.text_processor.eval
    settings = [
        FORMAT_VERSION,
        config.format,
        text.name,
        text.max_words,
        text.prompt,
        sample_format,
        template.fingerprint(),
    ]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for file in builder.annotation_files(split):
        with file.open("rb") as content:
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:32]


def _write(folder: Path, builder: InstructionBuilder, split: str, template: ChatTemplate | CaptionTemplate) -> None:
    report = PrepareReport()
    with (folder / "table.arrow").open("wb") as file:
        with pa.ipc.new_file(file, _SCHEMA) as writer:
            conversations = builder.conversations(split, report.drop)
            while chunk := list(islice(conversations, _CHUNK)):
                rows = list(_encoded(chunk, template, report))
                report.kept += len(rows)
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=_SCHEMA))
        file.flush()
        os.fsync(file.fileno())
    report.rows = report.kept + report.num_dropped
    if not report.kept:
        first = next((p.examples[0] for p in report.dropped.values()), "The files are empty.")
        files = ", ".join(map(str, builder.annotation_files(split)))
        raise DataError(f"{files}: none of {report.rows} rows can be used. {first}")
    (folder / "report.json").write_text(json.dumps(asdict(report), ensure_ascii=False), encoding="utf-8")


def _encoded(
    conversations: list[Conversation], template: ChatTemplate | CaptionTemplate, report: PrepareReport
) -> Iterator[dict[str, Any]]:
    for conversation, sample in zip(conversations, template.encode_many(conversations), strict=True):
        if isinstance(sample, RowError):
            report.drop(sample)
            continue
        yield {
            "input_ids": sample.input_ids,
            "labels": sample.labels,
            "images": sample.images,
            "length": len(sample),
            "num_tokens": sample.num_tokens,
            "conversation": _to_json(conversation),
        }


def _to_json(conversation: Conversation) -> str:
    """Texts as strings, images as lists of one string."""
    messages = [(m.role, [p if isinstance(p, str) else [p.path] for p in m.parts]) for m in conversation.messages]
    labels = {"id": conversation.id, "kind": conversation.kind, "lang": conversation.lang}
    return json.dumps({"messages": messages, **labels}, ensure_ascii=False)


def _publish(work: Path, folder: Path) -> None:
    """Rename the finished table to its place, unless another process was faster."""
    work.chmod(0o755)  # mkdtemp makes it private
    try:
        work.rename(folder)
    except OSError:
        if not folder.exists():
            raise
