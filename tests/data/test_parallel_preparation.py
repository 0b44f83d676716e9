"""Preparation by several processes gives the table, the report and the errors of one process, bit for bit."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from lavis.config.schema import DataEntry, ProcessorConfig, TextConfig
from lavis.core.errors import ConfigError, DataError
from lavis.core.registries import DIALECTS
from lavis.core.types import Conversation, Example, Message
from lavis.data import prepare as module
from lavis.data.image import image_processor
from lavis.data.prepare import prepare
from lavis.data.sources import FileSource
from lavis.tokens.caption import CaptionTemplate
from lavis.tokens.document import DocumentTemplate
from lavis.tokens.pairs import PairTemplate
from lavis.tokens.template import ChatTemplate
from tests.data.data_toys import media

COUNT = 150


def turns(question: Any, answer: Any, **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def mixed(i: int) -> Any:
    """Row `i`: one in six is bad, each time for another reason."""
    bad = [
        "not an object",
        {"question": i},
        {"instruction": f"row {i}"},
        turns("Hi", " "),
        turns("Hi " * 300, "no"),
        {"video": "a.mp4", "instruction": "a", "output": "b"},
    ]
    if i % 6 == 3:
        return bad[i // 6 % len(bad)]
    if i % 6 == 4:
        return {"image": f"{i % 9}.png", "instruction": f"What {i}?", "output": "红 red"}
    return turns(f"<image>\nWhat {i}?", "yes " * (i % 13 + 1), image=f"{i % 7}.png", id=i, lang="en")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 7)


@pytest.fixture
def files(cache: Path) -> list[str]:
    """The same rows as a list and a row a line, some lines of which are no JSON."""
    rows = [mixed(i) for i in range(COUNT)]
    (cache / "a.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    lines = [json.dumps(row) for row in rows]
    lines[::31] = ['{"a" 3}' for _ in lines[::31]]
    (cache / "b.jsonl").write_text("\n".join(lines))
    return ["a.json", "b.jsonl"]


def both_ways(source: FileSource, template: Any, share: module.Share = module.ALL) -> list[tuple[str, bytes, str]]:
    """(folder's name, table, report) as one process makes them and as three do."""
    found = []
    for processes in (1, 3):
        folder = prepare(source, template, share, processes).folder
        found.append((folder.name, (folder / module.FILE).read_bytes(), (folder / module.REPORT).read_text()))
        shutil.rmtree(folder)
    return found


def entry_of(path: Any, **options: Any) -> FileSource:
    return FileSource(DataEntry(name="mine", path=path, images="pictures", **options), "data.train.0", "train")


def test_conversations(files: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(tokenizer, media(4), max_length=100)
    one, three = both_ways(entry_of(files, text=TextConfig(prompt="Look: ")), template)
    assert one == three
    report = json.loads(one[2])
    assert report["rows"] == 2 * COUNT and len(report["dropped"]) == 7
    assert report["dropped"]["bad JSON"]["count"] == 5


def test_pieces_do_not_show(
    files: list[str], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = ChatTemplate(tokenizer, media(4), max_length=100)
    found = []
    for chunk in (7, 10_000):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        table = prepare(entry_of(files), template, processes=3)
        found.append((table._table.to_pydict(), table.report))
        shutil.rmtree(table.folder)
    assert found[0] == found[1]


@pytest.mark.parametrize("share", [(0.0, 0.4), (0.4, 1.0)])
def test_shares(files: list[str], tokenizer: PreTrainedTokenizerFast, share: module.Share) -> None:
    one, three = both_ways(entry_of(files), ChatTemplate(tokenizer, media(4), max_length=100), share)
    assert one == three


def test_sizes_of_pictures(cache: Path, files: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    (cache / "pictures").mkdir()
    for i in range(6):
        Image.new("RGB", (20 + 30 * i, 40)).save(cache / "pictures" / f"{i}.png")
    processor = image_processor(ProcessorConfig(name="image_plain", image_size=28, tiling="tiles"))
    template = ChatTemplate(tokenizer, media(2, processor=processor), max_length=100)
    one, three = both_ways(entry_of(files), template)
    assert one == three and "an image's size cannot be read" in one[2]


def test_other_kinds(cache: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [{"text": "Hi red " * (i % 9)} if i % 5 else {"no": 1} for i in range(COUNT)]
    pairs = [{"prompt": f"What {i}?", "chosen": "red", "rejected": "no" if i % 4 else ""} for i in range(COUNT)]
    captions = [{"image": f"{i}.png", "instruction": "", "output": f"red {i}"} for i in range(COUNT)]
    chat = ChatTemplate(tokenizer, media(2), max_length=60)
    templates = {
        "document": (documents, DocumentTemplate(tokenizer, 32)),
        "pair": (pairs, PairTemplate(chat)),
        "caption": (captions, CaptionTemplate(tokenizer, 20)),
    }
    for kind, (rows, template) in templates.items():
        (cache / f"{kind}.json").write_text(json.dumps(rows))
        one, three = both_ways(entry_of(f"{kind}.json", kind=kind), template)
        assert one == three, kind


# ---- parts of one's own


class Letters(FileSource):
    """Rows that are in no file, one of which pickle can't send."""

    def files(self) -> list[Path]:
        return []

    def rows(self, on_error: Any = None) -> Iterator[tuple[str, dict[str, Any]]]:
        for i in range(COUNT):
            row = {"text": f"Hi {i}", "made": iter("x") if i == 40 else None}
            yield f"letter {i}", {key: value for key, value in row.items() if value is not None}


class Sentences(Letters):
    """Examples without rows."""

    def examples(self, on_error: Any = None) -> Iterator[Example]:
        for i in range(COUNT):
            yield Conversation((Message("user", (f"Hi {i}",)), Message("assistant", ("yes",))), f"sentence {i}")


@pytest.fixture
def own_dialect() -> Iterator[None]:
    """A dialect that only this process knows of."""

    class Mine:
        @staticmethod
        def matches(row: dict[str, Any]) -> bool:
            return "q" in row

        @staticmethod
        def read(row: dict[str, Any], where: str) -> Conversation:
            if row["q"] == "config":
                raise ConfigError(f"{where}: a key is wrong")
            return Conversation((Message("user", (row["q"],)), Message("assistant", (row["a"],))), where)

    DIALECTS.register("mine")(Mine)
    yield
    DIALECTS._entries.pop("mine")


def test_sources_of_ones_own(cache: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    template = DocumentTemplate(tokenizer, 16)
    letters = Letters(DataEntry(source="letters", kind="document"), "data.train.0", "train")
    one, three = both_ways(letters, template)
    assert one == three
    sentences = Sentences(DataEntry(source="sentences"), "data.train.0", "train")
    one, three = both_ways(sentences, ChatTemplate(tokenizer, None))
    assert one == three and json.loads(one[2])["kept"] == COUNT


def test_a_dialect_of_ones_own_and_its_errors(
    cache: Path, tokenizer: PreTrainedTokenizerFast, own_dialect: type
) -> None:
    rows = [{"q": f"What {i}?", "a": "red"} if i % 11 else {"q": "What?"} for i in range(COUNT)]
    (cache / "mine.json").write_text(json.dumps(rows))
    template = ChatTemplate(tokenizer, None)
    one, three = both_ways(entry_of("mine.json"), template)
    assert one == three and json.loads(one[2])["dropped"]["the dialect fails"]["count"] == 14
    rows[90] = {"q": "config"}
    (cache / "mine.json").write_text(json.dumps(rows))
    for processes in (1, 3):
        with pytest.raises(ConfigError, match=r"mine\.json row 91: a key is wrong"):
            prepare(entry_of("mine.json"), template, processes=processes)
    assert list((cache / "prepared").iterdir()) == []


def test_a_file_that_is_cut_off_leaves_nothing(
    cache: Path, files: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    text = (cache / "a.json").read_text()
    (cache / "a.json").write_text(text[:-200])
    line = text[:-200].count("\n") + 1
    for processes in (1, 3):
        with pytest.raises(DataError, match=rf"a\.json, line {line}, column \d+: bad JSON"):
            prepare(entry_of(files), ChatTemplate(tokenizer, media(4)), processes=processes)
    assert list((cache / "prepared").iterdir()) == []


CHILD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, and all below it, ignore it
from lavis.config.schema import DataEntry
from lavis.core.registries import DIALECTS
from lavis.core.types import Conversation, Message
from lavis.data import prepare as module
from lavis.data.sources import FileSource
from lavis.tokens.template import ChatTemplate
from tests.data.data_toys import small_tokenizer

@DIALECTS.register("slow")
class Slow:
    matches = staticmethod(lambda row: True)
    def read(row, where):
        if row["i"] == 40:
            print("there", flush=True, file=sys.stderr)
            time.sleep(60)
        return Conversation((Message("user", ("Hi",)), Message("assistant", ("yes",))), where)

module._CHUNK = 5
source, template = FileSource(DataEntry(path="rows.json"), "k", "train"), ChatTemplate(small_tokenizer(), None)
try:
    module.prepare(source, template, processes=2)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_leaves_nothing(cache: Path) -> None:
    (cache / "rows.json").write_text(json.dumps([{"i": i} for i in range(COUNT)]))
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr and process.stderr.readline() == "there\n"
    assert len(list((cache / "prepared").iterdir())) == 1
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130, said
    assert "Traceback" not in said and list((cache / "prepared").iterdir()) == []


def test_the_log_says_how_far_it_is(
    files: list[str], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr("lavis.data.progress.time.monotonic", itertools.count(step=10).__next__)
    with caplog.at_level("INFO", "lavis"):
        prepare(entry_of(files), ChatTemplate(tokenizer, media(4), max_length=100), processes=2)
    lines = [r.getMessage() for r in caplog.records if "prepared" in r.getMessage()]
    assert lines and all(line.startswith("mine train: ") for line in lines)
    assert "28 rows prepared (" in lines[0] and "of the files), " in lines[-1]
