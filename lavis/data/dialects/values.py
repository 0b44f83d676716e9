"""Reading values out of a row; what is wrong is said with the row's name."""

from __future__ import annotations

from typing import Any

from lavis.core.types import RowError
from lavis.data.files import Row

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}


def role_of(name: Any, where: str) -> str:
    """The role that a name in a file means."""
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowError("unknown role", where, f"Use one of {', '.join(ROLES)}.", repr(name))
    return role


def text_of(value: Any, key: str, where: str) -> str:
    """`value`, which has to be text."""
    if not isinstance(value, str):
        raise RowError(f"{key!r} is not text", where, "Give a string.", type(value).__name__)
    return value


def texts_of(row: Row, key: str, where: str) -> list[str]:
    """The text or texts at `key`."""
    value = row.get(key)
    if value is None:
        raise RowError(f"{key!r} is missing", where, "Give a string, or a list of strings for several turns.")
    return [text_of(v, key, where) for v in (value if isinstance(value, list) else [value])]


def list_of(row: Row, key: str, where: str) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, list):
        raise RowError(f"{key!r} is not a list", where, "Give a list of turns.", type(value).__name__)
    return value


def images_of(row: Row, where: str) -> list[str]:
    """Paths of the row's pictures, under `image` or `images`."""
    value = row.get("image", row.get("images", []))
    return [image_path(v, where) for v in (value if isinstance(value, list) else [value])]


def image_path(value: Any, where: str) -> str:
    """The path of an image file in a value, which may be the cell of a Parquet image column."""
    value = value.get("path") if isinstance(value, dict) else value
    if not isinstance(value, str) or not value:
        raise RowError("an image without a path", where, "Give the path of an image file.", type(value).__name__)
    if value.startswith(("http://", "https://", "data:")):
        raise RowError("an image is not a file", where, "Save it in the image folder and give its path.", value[:40])
    return value.removeprefix("file://")


def labels_of(row: Row, where: str) -> dict[str, str]:
    """`id`, `kind` and `lang` of a row; without an id, its place is the id."""
    labels = {key: str(row.get(key, "")) for key in ("id", "kind", "lang")}
    return {**labels, "id": labels["id"] or where}
