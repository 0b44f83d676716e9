"""A JSON list read piece by piece: what json.load gives, and its errors with line and column, whatever the pieces."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from lavis.core.errors import DataError
from lavis.core.types import RowError
from lavis.data import json_rows
from lavis.data.files import read_rows

GOOD = {
    "empty": "[]",
    "empty, spaced": " \n[ \r\n\t]\n ",
    "spaces": '\n [ {"a" : 1 } ,\n\n{"a":\t2}\r\n,{}]\n\n',
    "nested": '[{"a": [[[{"b": {"c": [1, [2, {"d": []}]]}}]]]}, {"a": "[{,]}"}]',
    "unicode": '[{"a": "图像 🜂 é"}, {"图": "\u2028"}]',
    "escapes": r'[{"a": "\"\\\/\b\f\n\r\t\u0041\ud83d\ude00 \ud83d"}, {"b\"\\": "\\\\"}]',
    "numbers": "[1, -2, 3.25, 1e5, 1E+5, 2e-3, -0.0, 12345678901234567890, NaN, -Infinity, Infinity, 7]",
    "literals": '[true, false, null, "text", [], {}, [true], {"a": null}]',
    "one number": "[17]",
    "equal keys": '[{"a": 1, "a": 2}]',
    "long row": json.dumps([{"a": "x" * 300}, {"b": "y\\" * 200}]),
}
BAD = {
    "cut in a string": '[{"a": 1},\n{"a": "b',
    "cut in a row": '[{"a": 1},\n{"a": [1, 2',
    "cut in a word": '[{"a": 1}, {"a": tru',
    "cut in an escape": r'[{"a": 1}, {"a": "\u00',
    "cut behind a key": '[{"a": 1}, {"a"',
    "cut behind a row": '[{"a": 1}',
    "cut behind a comma": '[{"a": 1},\n ',
    "cut at once": "[",
    "nothing": "",
    "space alone": " \n ",
    "no comma": '[{"a": 1}\n {"a": 2}, {"a": 3}]',
    "no colon": '[\n{"a": 1},\n{"a" 2}]',
    "no quotes": '[{"a": 1},\n\n  {a: 2}]',
    "bad escape": '[{"a": "\\x"}, {"a": 1}]',
    "line break in a string": '[{"a": "x\ny"}, {"a": 1}]',
    "comma at the end": '[{"a": 1}\n, \n ]',
    "comma at the end of a row": '[{"a": 1,}, {"a": 1}]',
    "two commas": '[{"a": 1},, {"a": 1}]',
    "comma first": '[,{"a": 1}]',
    "another list": '[{"a": 1}]\n[{"a": 2}]',
    "a word behind": '[{"a": 1}]\n\n  x',
    "a brace too many": '[{"a": 1}}]',
    "a number with a point": "[1, 2.]",
    "a number with a letter": "[1, 2e]",
    "a word for a list": "\n  hello",
}
BLOCKS = [1, 2, 3, 5, 7, 16, 64, 1 << 20]


def reference(text: str) -> list[Any]:
    """What json makes of the text as Python reads files: every line break is one character."""
    return json.loads(text.replace("\r\n", "\n").replace("\r", "\n"))


@pytest.fixture(params=BLOCKS)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(json_rows, "BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("what", GOOD)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_it_gives_what_json_gives(tmp_path: Path, block: int, what: str, encoding: str) -> None:
    file = tmp_path / "rows.json"
    file.write_bytes(GOOD[what].encode(encoding))
    found = list(json_rows.read_json_list(file))
    assert repr(found) == repr(reference(GOOD[what]))  # repr tells 1 from 1.0 and True, and NaN is itself


@pytest.mark.parametrize("what", BAD)
def test_its_errors_are_those_of_json_at_their_place(tmp_path: Path, block: int, what: str) -> None:
    file = tmp_path / "rows.json"
    file.write_bytes(BAD[what].encode())
    with pytest.raises(json.JSONDecodeError) as expected:
        reference(BAD[what])
    e = expected.value
    with pytest.raises(DataError) as caught:
        list(json_rows.read_json_list(file))
    assert str(caught.value) == f"{file}, line {e.lineno}, column {e.colno}: bad JSON ({e.msg}). Correct the file."


def test_rows_before_an_error_are_given(tmp_path: Path, block: int) -> None:
    (tmp_path / "rows.json").write_text('[{"a": 1}, {"a": 2}, {"a" 3}]')
    rows = read_rows(tmp_path / "rows.json")
    assert [next(rows), next(rows)] == [(1, {"a": 1}), (2, {"a": 2})]
    with pytest.raises(DataError, match="line 1, column 27"):
        next(rows)


@pytest.mark.parametrize("text", ['"text"', "3", " null"])
def test_what_is_no_list_is_named(tmp_path: Path, block: int, text: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=f"holds a {type(json.loads(text)).__name__}, not a list"):
        list(read_rows(tmp_path / "rows.json"))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv"])
def test_the_byte_that_is_no_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(json_rows, "BLOCK", 10)
    for before in range(30, 42):  # across the borders of the pieces that are read
        start = b'[{"a": "' if name == "rows.json" else b'{"a": "' if name == "rows.jsonl" else b'a\n"'
        content = start + "é".encode() * ((before - len(start)) // 2) + b"x" * ((before - len(start)) % 2)
        (tmp_path / name).write_bytes(content + b"\xe9\x28" + b"y" * 50)
        with pytest.raises(DataError, match=rf"not UTF-8 text \(byte {before}\)"):
            list(read_rows(tmp_path / name))


def test_objects_a_line_are_told_from_a_list_behind_any_space(tmp_path: Path, block: int) -> None:
    (tmp_path / "rows.json").write_text('\n\n   {"a": 1}\n{"a": 2}\n', encoding="utf-8-sig")
    assert list(read_rows(tmp_path / "rows.json")) == [(3, {"a": 1}), (4, {"a": 2})]


def test_a_long_file_is_never_in_memory(tmp_path: Path) -> None:
    row = {"id": "7", "conversations": [{"from": "human", "value": "What is this? " * 20}] * 4}
    file = tmp_path / "rows.json"
    with file.open("w") as out:
        out.write("[" + ",\n".join([json.dumps(row)] * 20_000) + "]")
    assert file.stat().st_size > 20 << 20
    told: list[int] = []
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_rows(file, on_bytes=told.append))
        assert tracemalloc.get_traced_memory()[1] < 8 * json_rows.BLOCK
    finally:
        tracemalloc.stop()
    assert count == 20_000 and told == sorted(told) and told[-1] == file.stat().st_size and len(set(told)) > 10


def test_numbers_and_bad_rows_go_on_across_pieces(tmp_path: Path, block: int) -> None:
    (tmp_path / "rows.json").write_text('[{"a": 1}, "x", {"a": null, "b": 2}, 3, {"a": 4}]')
    errors: list[RowError] = []
    assert list(read_rows(tmp_path / "rows.json", errors.append)) == [(1, {"a": 1}), (3, {"b": 2}), (5, {"a": 4})]
    assert [e.where for e in errors] == ["rows.json row 2", "rows.json row 4"]
