"""Preparation: cached by content, safe against races, bad rows dropped and counted."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lavis.config.schema import DataEntry, TextConfig
from lavis.core.errors import ConfigError, DataError
from lavis.core.registries import SOURCES
from lavis.data import prepare as module
from lavis.data.prepare import prepare
from lavis.data.sources import FileSource
from lavis.data.table import PreparedTable
from lavis.tokens.caption import CaptionTemplate
from lavis.tokens.template import ChatTemplate
from tests.data.data_toys import media

ROWS: list[Any] = [
    {"id": "one", "kind": "colour", "lang": "en", "image": "a.png", "instruction": "What?", "output": "red"},
    {"image": "a.png", "instruction": "Hi"},
    {"instruction": ["Hi", "yes"], "output": ["no", "Hi"]},
    {"image": "b.png", "instruction": "Hi " * 200, "output": "no"},
    "not an object",
]


def source(cache: Path, rows: list[Any] = ROWS, **options: Any) -> FileSource:
    (cache / "rows.json").write_text(json.dumps(rows))
    entry = DataEntry(name="mine", path="rows.json", images="pictures", **options)
    return FileSource(entry, "data.train.0", "train")


@pytest.fixture
def template(tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    return ChatTemplate(tokenizer, media(4), max_length=100)


def test_table_holds_samples_conversations_and_report(cache: Path, template: ChatTemplate) -> None:
    table = prepare(source(cache), template)
    assert len(table) == 2
    conversation = table.conversation(0)
    assert conversation == next(source(cache).examples())
    assert (conversation.id, conversation.kind, conversation.lang) == ("one", "colour", "en")
    sample = template.encode(conversation)
    assert table.sample(0).input_ids == sample.input_ids and table.sample(0).labels == sample.labels
    assert table.sample(0).images == (str(cache / "pictures" / "a.png"),)
    assert table.lengths.tolist() == [len(table.sample(i)) for i in range(2)] and table.lengths.dtype == "int32"
    assert table.supervised_tokens.tolist() == [table.sample(i).supervised_tokens for i in range(2)]
    report = table.report
    assert (report.rows, report.kept) == (5, 2)
    assert {reason: p.count for reason, p in report.dropped.items()} == {
        "'output' is missing": 1,
        "no supervised token left after truncation": 1,
        "the row is not a JSON object": 1,
    }
    assert "rows.json row 2" in report.dropped["'output' is missing"].examples[0]


def test_table_pickles_small(cache: Path, template: ChatTemplate) -> None:
    table = prepare(source(cache), template)
    data = pickle.dumps(table)
    assert len(data) < 2000 and pickle.loads(data).sample(1) == table.sample(1)


def test_second_call_reuses_what_changes_rebuilds(
    cache: Path, template: ChatTemplate, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    write = module._write
    monkeypatch.setattr(module, "_write", lambda folder, *rest: (made.append(folder), write(folder, *rest)))
    prepare(source(cache), template)
    prepare(source(cache), template)
    assert len(made) == 1
    prepare(source(cache, ROWS[:1]), template)
    prepare(source(cache), ChatTemplate(tokenizer, media(5), max_length=100))
    prepare(source(cache), CaptionTemplate(tokenizer, 20))
    table = prepare(source(cache, text=TextConfig(prompt="Look: ")), template)
    assert len(made) == 5
    assert table.conversation(0).messages[0].parts[-1] == " Look: What?"
    assert sorted(p.name for p in (cache / "prepared").glob(".*")) == []


def test_racing_preparations_agree(cache: Path, template: ChatTemplate) -> None:
    b = source(cache)
    with ThreadPoolExecutor(4) as pool:
        tables: list[PreparedTable] = list(pool.map(lambda _: prepare(b, template), range(4)))
    assert len({t.folder for t in tables}) == 1 and all(len(t) == 2 for t in tables)
    assert len(list((cache / "prepared").iterdir())) == 1


def test_nothing_usable_is_an_error_and_leaves_nothing(cache: Path, template: ChatTemplate) -> None:
    for rows in (ROWS[1:2], []):
        with pytest.raises(DataError, match=f"none of {len(rows)} rows"):
            prepare(source(cache, rows), template)
    assert list((cache / "prepared").iterdir()) == []


def test_missing_files_and_splits_are_told(cache: Path) -> None:
    b = source(cache)
    (cache / "rows.json").unlink()
    with pytest.raises(DataError, match=r"rows\.json does not exist.*data\.train\.0\.path"):
        b.files()
    with pytest.raises(DataError, match="Did you mean 'train'"):
        SOURCES.get("shapes_text")(DataEntry(source="shapes_text"), "data.train.0", "trian").files()


def test_mixed_dialects_are_told_apart_row_by_row(cache: Path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "yes"}]
    rows = [{"conversations": turns}, {"instruction": "Hi", "output": "yes"}]
    first, second = source(cache, rows).examples()
    assert first.messages == second.messages


def test_shapes_generate_themselves(cache: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    sizes = {"train": 2, "val": 2, "test": 2, "text_train": 2, "text_val": 2, "size": 32}
    for name, splits in {
        "shapes_instruction": ["train", "interviews", "val", "test"],
        "shapes_caption": ["train"],
        "shapes_text": ["train", "val"],
    }.items():
        assert list(SOURCES.get(name).parts) == splits
        template = (
            CaptionTemplate(tokenizer, 64)
            if name == "shapes_caption"
            else ChatTemplate(tokenizer, media(4), max_length=2000)
        )
        for split in splits:
            shapes = SOURCES.get(name)(DataEntry(source=name, generate=sizes), "data.train.0", split)
            table = prepare(shapes, template)
            assert table.report.num_dropped == 0
            assert all(Path(p).is_file() for p in table.sample(0).images)
            assert bool(table.sample(0).images) == (name != "shapes_text")
    with pytest.raises(ConfigError, match="Did you mean 'train'"):
        SOURCES.get("shapes_text")(DataEntry(source="shapes_text", generate={"trian": 1}), "data.train.0", "train")
