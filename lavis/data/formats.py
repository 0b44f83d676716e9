"""Annotation files to rows, and rows of every dialect to `Conversation`."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lavis.core.errors import DataError
from lavis.core.types import IMAGE_TAG, Conversation, ImageRef, Message, RowError

Row = dict[str, Any]
Parts = tuple["str | ImageRef", ...]
OnError = Callable[[RowError], None]

FORMATS = ("minigpt4qwen", "llava", "sharegpt", "messages", "alpaca")
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
_LLAVA_TAG = re.compile(r"<image>[\n ]?")
_JSON_COLUMNS = ("conversations", "messages", "image", "images", "instruction", "output")


# ---- files to rows


def read_rows(path: Path, on_error: OnError | None = None) -> Iterator[tuple[int, Row]]:
    """Rows of a JSON list, JSONL, CSV or Parquet file with their numbers, counted from 1 (JSONL: the line).

    A row that can't be read goes to `on_error`, which may keep it for a report; without one it is raised.
    Raises DataError, naming file and line, when the file as a whole can't be read.
    """
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: annotation files end in {', '.join(readers)}. Rename or convert the file.")
    for number, row in reader(path):
        if isinstance(row, dict):
            # A missing value is spelled null in Parquet and JSON, and left empty in CSV.
            yield number, {key: value for key, value in row.items() if value is not None}
            continue
        error = row if isinstance(row, RowError) else _not_an_object(path, number, row)
        if on_error is None:
            raise error
        on_error(error)


def where_of(path: Path, number: int) -> str:
    """How messages name a row."""
    return f"{path.name} row {number}"


def _not_an_object(path: Path, number: int, row: Any) -> RowError:
    mend = 'Write each row as {"key": value, ...}.'
    return RowError("the row is not a JSON object", where_of(path, number), mend, type(row).__name__)


def _read_json(path: Path) -> Iterable[tuple[int, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start}). Save the file as UTF-8.") from None
    if text.lstrip().startswith("{"):  # one object a line, in spite of the name
        return _read_jsonl(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: bad JSON ({error.msg}). Mend the file."
        ) from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds a {type(rows).__name__}, not a list of rows. Put the rows in a JSON list.")
    return enumerate(rows, start=1)


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                where = f"{path}, line {number}, column {error.colno}"
                yield number, RowError("bad JSON", where, "Mend or delete the line.", error.msg)


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=1):
            if None in row or None in row.values():
                mend = "Quote cells that hold commas or line breaks."
                yield number, RowError("cells do not match the header", where_of(path, number), mend)
                continue
            yield number, {key: _cell(key, value) for key, value in row.items() if value != ""}


def _cell(key: str, text: str) -> Any:
    """A cell of a column that may hold a list: that list if the text is one in JSON, else the text."""
    if key not in _JSON_COLUMNS or not text.startswith("["):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: can't be read as Parquet ({error}). Write the file again.") from None


# ---- rows to conversations


def detect_format(row: Row) -> str:
    """The dialect a row is written in, by its keys. Raises DataError when it is none that is known."""
    if "messages" in row:
        return "messages"
    if "conversations" in row:
        return "llava" if "image" in row or "images" in row else "sharegpt"
    if "instruction" in row:
        return "alpaca" if "input" in row else "minigpt4qwen"
    raise DataError(
        f"no known annotation dialect has the keys {sorted(row)}. Known: 'instruction' + 'output' (minigpt4qwen,"
        " alpaca), 'conversations' (llava, sharegpt), 'messages' (OpenAI)."
    )


def to_conversation(row: Row, format: str, *, where: str) -> Conversation:
    """Read a row of dialect `format` (one of FORMATS). `where` names the row in messages.

    The result has at most one system message, first; then user and assistant turns alternate, beginning with user and
    ending with assistant. A leading assistant turn and a trailing unanswered user turn are dropped.
    Raises RowError (a DataError) saying what is wrong, where, and the mend.
    """
    if "video" in row or "videos" in row:
        raise RowError("the row refers to a video", where, "Videos are not supported: give single frames as images.")
    readers = {
        "minigpt4qwen": _from_instruction,
        "alpaca": _from_instruction,
        "llava": _from_conversations,
        "sharegpt": _from_conversations,
        "messages": _from_messages,
    }
    messages = _well_formed(readers[format](row, where), where)
    labels = {key: str(row.get(key, "")) for key in ("id", "kind", "lang")}
    return Conversation(messages=messages, **{**labels, "id": labels["id"] or where})


def _from_instruction(row: Row, where: str) -> list[Message]:
    asked, answered = (_texts(row, key, where) for key in ("instruction", "output"))
    if len(asked) != len(answered):
        detail = f"{len(asked)} instructions, {len(answered)} outputs"
        raise RowError(
            "instruction and output differ in length", where, "Give one output for each instruction.", detail
        )
    if row.get("input"):
        asked[0] = f"{asked[0]}\n{_text(row['input'], 'input', where)}"
    turns = [m for q, a in zip(asked, answered, strict=True) for m in (("user", q), ("assistant", a))]
    if row.get("system"):
        turns.insert(0, ("system", _text(row["system"], "system", where)))
    return _place_images(turns, _images(row, where), re.compile(re.escape(IMAGE_TAG)), where)


def _from_conversations(row: Row, where: str) -> list[Message]:
    turns = []
    for turn in _list(row, "conversations", where):
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise RowError("a turn lacks 'from' or 'value'", where, 'Write turns as {"from": "human", "value": "..."}.')
        turns.append((_role(turn["from"], where), _text(turn["value"], "value", where)))
    return _place_images(turns, _images(row, where), _LLAVA_TAG, where)


def _from_messages(row: Row, where: str) -> list[Message]:
    """OpenAI messages. Text may hold `<image>` tags that stand for the row's `images`, as TRL and others write it."""
    turns, images = [], iter(_images(row, where))
    plain = True
    for turn in _list(row, "messages", where):
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise RowError("a message lacks 'role' or 'content'", where, 'Write messages as {"role", "content"}.')
        role, content = _role(turn["role"], where), turn["content"]
        plain = plain and isinstance(content, str)
        turns.append((role, content))
    if plain:
        return _place_images(turns, list(images), _LLAVA_TAG, where)
    messages = [Message(role, _content_parts(content, images, where)) for role, content in turns]
    if unused := len(list(images)):
        raise RowError(
            "images and image parts differ in number", where, "Give one image part per image.", f"{unused} left"
        )
    return messages


def _content_parts(content: Any, images: Iterator[str], where: str) -> Parts:
    """Parts of an OpenAI content list; an image part without an address takes the next of the row's `images`."""
    if isinstance(content, str):
        return (content,)
    parts: list[str | ImageRef] = []
    for item in content if isinstance(content, list) else ():
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "text":
            text = _text(item.get("text"), "text", where)
            gap = " " if parts and parts[-1] == "</Img>" and not text[:1].isspace() else ""
            parts.append(gap + text)
        elif kind in ("image", "image_url"):
            address = (
                item.get("image_url") or item.get("image") or item.get("url") or item.get("path") or next(images, None)
            )
            address = address.get("url") or address.get("path") if isinstance(address, dict) else address
            parts.extend(("<Img>", ImageRef(_image_path(address, where)), "</Img>"))
        else:
            raise RowError("a content part is neither text nor image", where, "Leave other parts out.", repr(kind))
    return _joined(parts)


def _place_images(
    turns: Sequence[tuple[str, str]], images: Sequence[str], tag: re.Pattern[str], where: str
) -> list[Message]:
    """Put the images where user turns hold `tag`; without any tag, before the first user turn."""
    found = sum(len(tag.findall(text)) for role, text in turns if role == "user")
    if found and found != len(images):
        mend = "Give one tag for each image, or none to put the images first."
        raise RowError("image tags and images differ in number", where, mend, f"{found} tags, {len(images)} images")
    rest = iter(images)
    messages = []
    for role, text in turns:
        parts: list[str | ImageRef] = [text]
        if role == "user" and found:
            parts = _split_at_tags(text, rest, tag)
        elif role == "user":
            parts = [p for path in rest for p in ("<Img>", ImageRef(path), "</Img>")]
            parts = [*parts, " " if parts else "", text]
        messages.append(Message(role, _joined(parts)))
    return messages


def _split_at_tags(text: str, images: Iterator[str], tag: re.Pattern[str]) -> list[str | ImageRef]:
    """The original writes `<Img>` around its tag itself; LLaVA's bare tag gets it, and a space in place of the line
    break.
    """
    bare = tag is _LLAVA_TAG
    pieces = tag.split(text)
    parts: list[str | ImageRef] = [pieces[0]]
    for piece in pieces[1:]:
        image = ImageRef(next(images))
        parts.extend(("<Img>", image, "</Img> " if piece else "</Img>", piece) if bare else (image, piece))
    return parts


def _joined(parts: Iterable[str | ImageRef]) -> Parts:
    """Neighbouring texts made one, empty ones left out."""
    joined: list[str | ImageRef] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return tuple(joined) or ("",)


def _well_formed(messages: list[Message], where: str) -> tuple[Message, ...]:
    system = messages[:1] if messages and messages[0].role == "system" else []
    turns = messages[len(system) :]
    if turns and turns[0].role == "assistant":
        turns = turns[1:]
    if turns and turns[-1].role == "user":
        turns = turns[:-1]
    if not turns:
        raise RowError("no question with an answer", where, "Give at least one user turn and its answer.")
    for i, message in enumerate(turns):
        if message.role != ("user", "assistant")[i % 2]:
            mend = "Let user and assistant turns alternate; a system message comes first."
            raise RowError("turns do not alternate", where, mend, f"turn {i + 1} is {message.role}")
        if message.role == "assistant" and not message.text.strip():
            raise RowError("an answer is empty", where, "Fill or delete it.", f"turn {i + 1}")
        if message.role != "user" and any(isinstance(p, ImageRef) for p in message.parts):
            raise RowError("an image outside a user turn", where, "Move it to a user turn.", f"turn {i + 1}")
    return (*system, *turns)


# ---- values


def _role(name: Any, where: str) -> str:
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowError("unknown role", where, f"Use one of {', '.join(_ROLES)}.", repr(name))
    return role


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{key!r} is not text", where, "Give a string.", type(value).__name__)
    return value


def _texts(row: Row, key: str, where: str) -> list[str]:
    value = row.get(key)
    if value is None:
        raise RowError(f"{key!r} is missing", where, "Give a string, or a list of strings for several turns.")
    return [_text(v, key, where) for v in (value if isinstance(value, list) else [value])]


def _list(row: Row, key: str, where: str) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, list):
        raise RowError(f"{key!r} is not a list", where, "Give a list of turns.", type(value).__name__)
    return value


def _images(row: Row, where: str) -> list[str]:
    value = row.get("image", row.get("images", []))
    return [_image_path(v, where) for v in (value if isinstance(value, list) else [value])]


def _image_path(value: Any, where: str) -> str:
    value = value.get("path") if isinstance(value, dict) else value  # the cell of a Parquet image column
    if not isinstance(value, str) or not value:
        raise RowError("an image without a path", where, "Give the path of an image file.", type(value).__name__)
    if value.startswith(("http://", "https://", "data:")):
        raise RowError("an image is not a file", where, "Save it in the image folder and give its path.", value[:40])
    return value.removeprefix("file://")
