"""Every dialect is read into the same Conversation; bad rows say what, where and the mend."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lavis.core.errors import DataError
from lavis.core.types import Conversation, MediaRef, Message, RowError
from lavis.data.dialects import detect, to_conversation
from lavis.data.files import read_rows

IMAGE = MediaRef("a.png")
ONE_TURN = (Message("user", (IMAGE, " What?")), Message("assistant", ("red",)))
SAME = {
    "minigpt4qwen": {"image": "a.png", "instruction": "<Img><ImageHere></Img> What?", "output": "red"},
    "minigpt4qwen without a tag": {"image": "a.png", "instruction": "What?", "output": "red"},
    "minigpt4qwen lists": {"image": ["a.png"], "instruction": ["<Img><ImageHere></Img> What?"], "output": ["red"]},
    "llava": {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}],
    },
    "messages": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What?"}],
            },
            {"role": "assistant", "content": "red"},
        ]
    },
    "messages with tags": {
        "images": ["a.png"],
        "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "red"}],
    },
    "alpaca": {"image": "a.png", "instruction": "What?", "input": "", "output": "red"},
}


def read(row: dict[str, Any]) -> Conversation:
    return to_conversation(row, detect(row), where="file row 1")


@pytest.mark.parametrize("name", SAME)
def test_dialects_agree(name: str) -> None:
    assert detect(SAME[name]) == name.split()[0]
    assert read(SAME[name]).messages == ONE_TURN


def test_sharegpt_is_text_only() -> None:
    row = {
        "conversations": [
            {"from": "system", "value": "S"},
            {"from": "human", "value": "Q"},
            {"from": "gpt", "value": "A"},
        ]
    }
    assert detect(row) == "sharegpt"
    assert [(m.role, m.text) for m in read(row).messages] == [("system", "S"), ("user", "Q"), ("assistant", "A")]


def test_alpaca_input_follows_the_instruction() -> None:
    assert read({"instruction": "Add", "input": "1 2", "output": "3"}).messages[0].text == "Add\n1 2"


def test_several_turns_and_images() -> None:
    row = {
        "image": ["a.png", "b.png"],
        "instruction": ["<Img><ImageHere></Img> one", "two <ImageHere>"],
        "output": ["x", "<ImageHere> stays text"],
        "id": 7,
        "kind": "colour",
        "lang": "en",
    }
    conversation = read(row)
    assert conversation.images == ("a.png", "b.png")
    assert conversation.messages[2].parts == ("two ", MediaRef("b.png"))
    assert conversation.messages[3].parts == ("<ImageHere> stays text",)
    assert (conversation.id, conversation.kind, conversation.lang) == ("7", "colour", "en")


def test_leading_answer_and_trailing_question_are_dropped() -> None:
    turns = [("gpt", "hello"), ("human", "Q"), ("gpt", "A"), ("human", "unanswered")]
    row = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    assert [m.text for m in read(row).messages] == ["Q", "A"]


def test_literal_image_tag_of_llava_in_an_answer_stays_text() -> None:
    row = {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "<image>"}],
    }
    assert read(row).messages == (Message("user", (IMAGE,)), Message("assistant", ("<image>",)))


BAD = {
    "differ in length": {"instruction": ["a", "b"], "output": ["c"]},
    "'output' is missing": {"instruction": "a"},
    "is not text": {"instruction": "a", "output": 3},
    "an answer is empty": {"instruction": "a", "output": " "},
    "tags and images differ": {"instruction": "<ImageHere>", "output": "x"},
    "1 tags, 2 images": {"image": ["a", "b"], "instruction": "<ImageHere>", "output": "x"},
    "refers to a video": {"video": "v.mp4", "instruction": "a", "output": "b"},
    "not a file": {"image": "https://example.org/a.png", "instruction": "a", "output": "b"},
    "without a path": {"image": {"bytes": "x"}, "instruction": "a", "output": "b"},
    "no question with an answer": {"instruction": [], "output": []},
    "unknown role": {"messages": [{"role": "tool", "content": "x"}]},
    "lacks 'role' or 'content'": {"messages": [{"role": "user"}]},
    "lacks 'from' or 'value'": {"conversations": ["x"]},
    "is not a list": {"conversations": "x"},
    "do not alternate": {
        "messages": [{"role": r, "content": "x"} for r in ("user", "user", "assistant")],
    },
    "outside a user turn": {
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]},
        ]
    },
    "neither text nor image": {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
}


@pytest.mark.parametrize("what", BAD)
def test_bad_rows_say_what_and_where(what: str) -> None:
    with pytest.raises(RowError, match=what) as caught:
        read(BAD[what])
    assert str(caught.value).startswith("file row 1: ")
    assert caught.value.fix in str(caught.value)


def test_unknown_dialect() -> None:
    with pytest.raises(DataError, match="no known annotation dialect"):
        detect({"question": "x"})


ROWS = [{"image": "a.png", "instruction": ["x", "红色?"], "output": ["y", "z"]}, {"instruction": "x", "output": "y"}]


def test_files_of_every_kind_give_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS), encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n", encoding="utf-8")
    (tmp_path / "c.json").write_text((tmp_path / "b.jsonl").read_text(), encoding="utf-8")
    with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "instruction", "output"])
        writer.writerow(["a.png", json.dumps(ROWS[0]["instruction"]), json.dumps(ROWS[0]["output"])])
        writer.writerow(["", "x", "y"])
    for name in "abcd":
        file = next(tmp_path.glob(f"{name}.*"))
        assert list(read_rows(file)) == [(1, ROWS[0]), (2, ROWS[1])], file.name


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(
        pa.Table.from_pylist([SAME["llava"], {"conversations": SAME["llava"]["conversations"]}]), tmp_path / "a.parquet"
    )
    rows = [row for _, row in read_rows(tmp_path / "a.parquet")]
    assert read(rows[0]).messages == ONE_TURN
    assert "image" not in rows[1]


def test_bad_json_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"a": 1},\n{"a" 2}]')
    with pytest.raises(DataError, match=r"a\.json, line 3"):
        list(read_rows(tmp_path / "a.json"))
    (tmp_path / "b.jsonl").write_text('{"a": 1}\n{"a" 2}\n3\n{"a": 4}')
    with pytest.raises(DataError, match=r"b\.jsonl, line 2"):
        list(read_rows(tmp_path / "b.jsonl"))
    errors: list[RowError] = []
    assert [number for number, _ in read_rows(tmp_path / "b.jsonl", errors.append)] == [1, 4]
    assert [e.reason for e in errors] == ["bad JSON", "the row is not a JSON object"]


def test_unreadable_files(tmp_path: Path) -> None:
    for name, content in (("a.txt", ""), ("a.parquet", "no"), ("a.json", '"text"'), ("b.json", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=name):
            list(read_rows(tmp_path / name))
