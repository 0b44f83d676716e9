"""Prepared rows as an Arrow table that workers memory-map."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence, Sized
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from lavis.core.types import Conversation, Example, MediaRef, MediaSpan, Message, Pair, Sample
from lavis.data.report import PrepareReport

FILE, REPORT = "table.arrow", "report.json"
SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "images": pa.list_(pa.string()),
        "starts": pa.list_(pa.int32()),
        "spans": pa.list_(pa.int32()),
        "tiles": pa.list_(pa.int32()),
        "parts": pa.list_(pa.int32()),
        "rejected_ids": pa.list_(pa.int32()),
        "rejected_labels": pa.list_(pa.int32()),
        "length": pa.int32(),
        "supervised_tokens": pa.int32(),
        "row": pa.string(),
    }
)


class PreparedTable:
    """A prepared entry, memory-mapped from `folder`. Pickles as its path, so workers of any start method can have it.

    image_root: folder that relative image paths are under.
    """

    def __init__(self, folder: Path, image_root: Path | None) -> None:
        self.folder, self.image_root = folder, image_root
        self._table = pa.ipc.open_file(pa.memory_map(str(folder / FILE))).read_all()
        self.lengths: np.ndarray = _numbers(self._table["length"])
        """int32 [n]: tokens of each sample, images included; of a pair, of both answers' samples."""
        self.supervised_tokens: np.ndarray = _numbers(self._table["supervised_tokens"])
        """int32 [n]: supervised tokens of each sample."""
        self.num_tiles: np.ndarray = _sums(self._table["tiles"])
        """int32 [n]: tiles of all images of each sample."""

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedTable, (self.folder, self.image_root)

    def __len__(self) -> int:
        return self._table.num_rows

    @cached_property
    def report(self) -> PrepareReport:
        """What became of the rows at preparation."""
        return PrepareReport.from_dict(json.loads((self.folder / REPORT).read_text(encoding="utf-8")))

    def sample(self, index: int) -> Sample:
        """Sample `index`, of a pair the chosen one; its image paths are absolute where there is an image folder."""
        return self._sample(index, "input_ids", "labels")

    def pair(self, index: int) -> tuple[Sample, Sample]:
        """The chosen and the rejected sample `index` of a table of pairs."""
        return self.sample(index), self._sample(index, "rejected_ids", "rejected_labels")

    def conversation(self, index: int) -> Conversation:
        """The conversation that sample `index` was made of, of a pair the chosen one, with image paths as in the
        annotations. A block of documents is none: it has no messages.
        """
        values = json.loads(self._table["row"][index].as_py())
        return _conversation(values.get("chosen", values))

    @cached_property
    def holds_conversations(self) -> bool:
        """Whether its rows are conversations or pairs, not blocks of documents."""
        return bool(len(self)) and bool(self.conversation(0).messages)

    def image_paths(self) -> list[str]:
        """Every image of the table once, absolute if there is an image folder."""
        return [self.image_path(p) for p in pa.compute.unique(_flat(self._table["images"])).to_pylist()]

    @property
    def num_images(self) -> int:
        """Images of all samples, one as often as it is shown."""
        return len(_flat(self._table["images"]))

    def image_path(self, path: str) -> str:
        """An image path of an annotation, absolute if there is an image folder."""
        return str(self.image_root / path) if self.image_root else path

    def _sample(self, index: int, ids: str, labels: str) -> Sample:
        paths = self._table["images"][index].as_py()
        media = zip(paths, *(self._numbers(index, column) for column in ("starts", "spans", "tiles")), strict=True)
        spans = tuple(MediaSpan(MediaRef(self.image_path(path)), *numbers) for path, *numbers in media)
        return Sample(self._numbers(index, ids), self._numbers(index, labels), spans, self._numbers(index, "parts"))

    def _numbers(self, index: int, column: str) -> tuple[int, ...]:
        return tuple(_int32(self._table[column][index].values).tolist())


def row_of(sample: Sample, rejected: Sample | None, example: Example | Iterable[str]) -> dict[str, Any]:
    """A row of a table. `example`: what the sample was made of; of a block, the ids of its documents."""
    return {
        "input_ids": sample.input_ids,
        "labels": sample.labels,
        "images": sample.images,
        "starts": [span.start for span in sample.media],
        "spans": [span.length for span in sample.media],
        "tiles": [span.tiles for span in sample.media],
        "parts": sample.parts,
        "rejected_ids": rejected.input_ids if rejected else (),
        "rejected_labels": rejected.labels if rejected else (),
        "length": len(sample) + (len(rejected) if rejected else 0),
        "supervised_tokens": sample.supervised_tokens,
        "row": json.dumps(_stored(example), ensure_ascii=False),
    }


def _stored(example: Example | Iterable[str]) -> dict[str, Any]:
    """As JSON: texts as strings, images as lists of the path and, where it is known, the size."""
    if isinstance(example, Pair):
        return {"chosen": _stored(example.chosen), "rejected": _stored(example.rejected)}
    if not isinstance(example, Conversation):
        assert isinstance(example, list)
        return {"messages": [], "documents": example, "id": example[0]}
    messages = [
        (m.role, [p if isinstance(p, str) else [p.path, *(p.size or ())] for p in m.parts]) for m in example.messages
    ]
    return {"messages": messages, "id": example.id, "kind": example.kind, "lang": example.lang}


def _conversation(values: dict[str, Any]) -> Conversation:
    def ref(path: str, *size: int) -> MediaRef:
        return MediaRef(path, (size[0], size[1]) if size else None)

    messages = tuple(
        Message(role, tuple(p if isinstance(p, str) else ref(*p) for p in parts)) for role, parts in values["messages"]
    )
    labels = {key: values[key] for key in ("id", "kind", "lang") if key in values}
    return replace(Conversation(messages), **labels)


# ---- columns to arrays and back, by their buffers: pyarrow's own ways import pandas, which takes a second and 40 MB


def record_batch(rows: Sequence[dict[str, Any]]) -> pa.RecordBatch:
    """A part of a table, of what `row_of` made."""
    columns = [_column([row[field.name] for row in rows], field.type) for field in SCHEMA]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_list(kind):
        inner = _column(list(chain.from_iterable(values)), kind.value_type)
        return pa.Array.from_buffers(kind, len(values), [None, _offsets(values)], children=[inner])
    if pa.types.is_string(kind):
        # half a surrogate pair, as JSON can spell it, is no character
        texts = [value.encode("utf-8", "replace") for value in values]
        return pa.Array.from_buffers(kind, len(values), [None, _offsets(texts), pa.py_buffer(b"".join(texts))])
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.array(values, np.int32))])


def _offsets(values: Sequence[Sized]) -> pa.Buffer:
    return pa.py_buffer(np.cumsum([0, *map(len, values)], dtype=np.int32))


def _int32(array: pa.Array) -> np.ndarray:
    """An array of 32-bit whole numbers without nulls."""
    data = array.buffers()[1]
    return np.frombuffer(data, np.int32, len(array), 4 * array.offset) if len(array) else np.zeros(0, np.int32)


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *map(_int32, column.chunks)])


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks().flatten()


def _sums(column: pa.ChunkedArray) -> np.ndarray:
    """int32 [n]: sum of each row's list."""
    counts = _numbers(pa.compute.list_value_length(column))
    ends = np.concatenate(([0], np.cumsum(_int32(_flat(column)), dtype=np.int32))).astype(np.int32)
    last = np.cumsum(counts)
    return ends[last] - ends[last - counts]
