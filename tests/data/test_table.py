"""A table's columns are what pyarrow makes of the same rows, to the byte; and no one pays for pandas."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerFast

from lavis.config.schema import DataEntry
from lavis.data.prepare import prepare
from lavis.data.sources import FileSource
from lavis.data.table import FILE, REPORT, SCHEMA, PreparedTable, record_batch
from lavis.tokens.template import ChatTemplate
from tests.data.data_toys import media


def row(i: int) -> dict[str, Any]:
    numbers = tuple(range(-i, 3 * i, 2))
    return {
        "input_ids": numbers,
        "labels": tuple(-100 for _ in numbers),
        "images": tuple(f"图{j}.png" for j in range(i % 3)),
        "starts": list(range(i % 3)),
        "spans": [32] * (i % 3),
        "tiles": [j + 1 for j in range(i % 3)],
        "parts": (),
        "rejected_ids": numbers[:1],
        "rejected_labels": (),
        "length": len(numbers),
        "supervised_tokens": i,
        "row": json.dumps({"text": "é" * i}, ensure_ascii=False),
    }


def written(batch: pa.RecordBatch) -> bytes:
    out = pa.BufferOutputStream()
    with pa.ipc.new_file(out, SCHEMA) as writer:
        writer.write_batch(batch)
    return out.getvalue().to_pybytes()


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_a_batch_is_what_pyarrow_makes_of_the_rows(count: int) -> None:
    rows = [row(i) for i in range(count)]
    batch = record_batch(rows)
    batch.validate(full=True)
    reference = pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
    assert batch == reference and written(batch) == written(reference)


def test_columns_of_several_parts_are_read_as_pyarrow_reads_them(tmp_path: Path) -> None:
    with pa.ipc.new_file(str(tmp_path / FILE), SCHEMA) as writer:
        for some in (range(4, 30), range(3), range(30, 31)):
            writer.write_batch(record_batch([row(i) for i in some]))
    (tmp_path / REPORT).write_text("{}")
    table = PreparedTable(tmp_path, None)
    arrow = table._table
    assert np.array_equal(table.lengths, arrow["length"].to_numpy()) and table.lengths.dtype == np.int32
    assert np.array_equal(table.supervised_tokens, arrow["supervised_tokens"].to_numpy())
    assert table.num_tiles.tolist() == [sum(tiles) for tiles in arrow["tiles"].to_pylist()]
    for i in (0, 5, 25, 26, 28, 29):
        assert list(table.sample(i).input_ids) == arrow["input_ids"][i].as_py()
        assert [span.length for span in table.sample(i).media] == arrow["spans"][i].as_py()


def test_half_a_character_is_kept_as_a_question_mark(cache: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (cache / "rows.json").write_text(r'[{"instruction": "Hi \ud83d", "output": "yes"}]')
    source = FileSource(DataEntry(path="rows.json"), "data.train.0", "train")
    table = prepare(source, ChatTemplate(tokenizer, media(4)))
    assert table.conversation(0).messages[0].text == "Hi ?"
    assert table.sample(0).input_ids == ChatTemplate(tokenizer, media(4)).encode(table.conversation(0)).input_ids


CHILD = """
import json, sys
from lavis.config.schema import DataEntry
from lavis.data.prepare import prepare
from lavis.data.sources import FileSource
from lavis.tokens.template import ChatTemplate
from tests.data.data_toys import small_tokenizer
table = prepare(FileSource(DataEntry(path="rows.json"), "k", "train"), ChatTemplate(small_tokenizer(), None))
table.sample(0), table.image_paths(), table.conversation(0)
assert "pandas" not in sys.modules
"""


def test_pandas_is_not_imported(cache: Path) -> None:
    (cache / "rows.json").write_text('[{"instruction": "Hi", "output": "yes"}]')
    subprocess.run([sys.executable, "-c", CHILD], check=True)
