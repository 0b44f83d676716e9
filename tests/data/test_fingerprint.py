"""A prepared table is found without reading its files while these look as they did; what changes in them counts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lavis.config.schema import DataEntry
from lavis.core.errors import DataError
from lavis.data import fingerprint as module
from lavis.data import prepare as prepare_module
from lavis.data.prepare import prepare
from lavis.data.sources import FileSource
from lavis.data.table import PreparedTable
from lavis.tokens.template import ChatTemplate
from tests.data.data_toys import media

SIZE = 4 << 20


@pytest.fixture
def rows(cache: Path) -> Path:
    """A file of which most is not looked at: each line is 1 KiB."""
    line = json.dumps({"instruction": "Hi", "output": "yes", "id": "0000000"})
    (cache / "rows.jsonl").write_text((line + " " * (1023 - len(line)) + "\n") * (SIZE >> 10))
    return cache / "rows.jsonl"


class Made:
    """Prepares, and notes which tables are written and which files are read."""

    def __init__(self, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
        self.template, self.written, self.read = template, 0, 0
        write, inside = prepare_module._write, module._inside

        def counted_write(*args: Any) -> None:
            self.written += 1
            write(*args)

        def counted_read(file: Path) -> Any:
            self.read += 1
            return inside(file)

        monkeypatch.setattr(prepare_module, "_write", counted_write)
        monkeypatch.setattr(module, "_inside", counted_read)

    def __call__(self, path: str = "rows.jsonl", **options: Any) -> PreparedTable:
        return prepare(FileSource(DataEntry(path=path, **options), "data.train.0", "train"), self.template)

    def counts(self) -> tuple[int, int]:
        """Tables written and files read since the last call."""
        counts = self.written, self.read
        self.written = self.read = 0
        return counts


@pytest.fixture
def made(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Made:
    return Made(ChatTemplate(tokenizer, media(4), max_length=100), monkeypatch)


def change(file: Path, at: int, *, stat: os.stat_result | None = None) -> None:
    """Another answer in the row at a byte; with `stat`, the file's times as they were."""
    with file.open("r+b") as content:
        content.seek(at // 1024 * 1024)
        line = content.read(1024).replace(b'"yes"', b'"red"')
        content.seek(at // 1024 * 1024)
        content.write(line)
    if stat:
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_an_unchanged_file_is_not_read_again(rows: Path, made: Made) -> None:
    first = made()
    assert made.counts() == (1, 1)
    assert made().folder == first.folder
    assert made.counts() == (0, 0)


def test_a_touched_or_moved_file_is_read_once_and_not_prepared_again(rows: Path, made: Made) -> None:
    folder = made().folder
    made.counts()
    os.utime(rows)
    assert made().folder == folder
    assert made.counts() == (0, 1)
    made()
    assert made.counts() == (0, 0)
    (rows.parent / "elsewhere").mkdir()
    shutil.copy2(rows, rows.parent / "elsewhere")
    assert made("elsewhere/rows.jsonl").folder == folder
    assert made.counts() == (0, 1)
    made(), made("elsewhere/rows.jsonl")
    assert made.counts() == (0, 0)


@pytest.mark.parametrize("at", [0, SIZE // 2 + 100_000, SIZE - 1])
@pytest.mark.parametrize("same_times", [False, True])
def test_a_change_anywhere_is_seen(rows: Path, made: Made, at: int, same_times: bool) -> None:
    folder, stat = made().folder, rows.stat()
    made.counts()
    change(rows, at, stat=stat if same_times else None)
    table = made()
    assert table.folder != folder and made.counts() == (1, 1)
    assert table.conversation(at // 1024).messages[1].text == "red"


@pytest.mark.parametrize("at", [0, SIZE // 15 * 7, SIZE - 1])
def test_a_change_in_the_sample_is_seen_whatever_the_times_say(
    rows: Path, made: Made, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, stat = rows.stat(), Path.stat

    def same(self: Path, **options: Any) -> os.stat_result:
        return frozen if self == rows else stat(self, **options)

    monkeypatch.setattr(Path, "stat", same)
    folder = made().folder
    change(rows, at)
    assert made().folder != folder
    assert made.counts() == (2, 2)


def test_settings_have_tables_of_their_own(rows: Path, made: Made) -> None:
    folders = {made().folder, made(supervise="markup").folder, made(format="alpaca").folder}
    assert len(folders) == 2  # what is supervised is the template's to say
    assert made.counts() == (2, 2)


def test_a_table_from_before_is_opened(rows: Path, made: Made) -> None:
    """Its name is what it has always been, and it holds no more than table and report."""
    source = FileSource(DataEntry(path="rows.jsonl"), "data.train.0", "train")
    settings = [2, "auto", {"name": "base_instruction", "max_words": None, "prompt": None}, "conversation", (0.0, 1.0)]
    content = json.dumps([*settings, made.template.fingerprint()]).encode() + f"rows.jsonl {SIZE}".encode()
    name = hashlib.sha256(content + rows.read_bytes()).hexdigest()[:32]
    assert prepare(source, made.template).folder.name == name
    for mark in (rows.parent / "prepared" / name).glob("*.seen"):
        mark.unlink()
    made.counts()
    assert made().folder.name == name and made.counts() == (0, 1)


def test_a_file_that_has_gone_is_told(rows: Path, made: Made) -> None:
    made()
    rows.unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl does not exist"):
        made()


def test_a_cache_that_cannot_be_written_is_read(rows: Path, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made().folder
    os.utime(rows)

    def refuse(self: Path, *args: Any) -> None:
        raise PermissionError(self)

    monkeypatch.setattr(Path, "touch", refuse)
    assert made().folder == folder
