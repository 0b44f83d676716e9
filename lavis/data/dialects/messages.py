"""OpenAI's rows: `messages`, a list of `{"role", "content"}`, whose content may be a list of text and image parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lavis.core.registries import DIALECTS
from lavis.core.types import Conversation, MediaRef, Message, RowError
from lavis.data.dialects.turns import BARE_TAG, message, place_images
from lavis.data.dialects.values import image_path, images_of, labels_of, list_of, role_of, text_of
from lavis.data.files import Row
from lavis.tokens.media import Part


@DIALECTS.register("messages")
class Messages:
    """Text may hold `<image>` tags that stand for the row's `images`, as TRL and others write it."""

    @staticmethod
    def matches(row: Row) -> bool:
        return "messages" in row

    @staticmethod
    def read(row: Row, where: str) -> Conversation:
        messages = read_messages(list_of(row, "messages", where), images_of(row, where), where)
        return Conversation(tuple(messages), **labels_of(row, where))


def read_messages(items: list[Any], images: list[str], where: str) -> list[Message]:
    """Messages of the list `items`; `images`: of the row, for tags and for image parts that have no address."""
    turns = [_turn(item, where) for item in items]
    if all(isinstance(content, str) for _, content in turns):
        return place_images(turns, images, BARE_TAG, where)
    rest = iter(images)
    messages = [message(role, _content_parts(content, rest, where)) for role, content in turns]
    if unused := len(list(rest)):
        raise RowError(
            "images and image parts differ in number", where, "Give one image part per image.", f"{unused} left"
        )
    return messages


def _turn(item: Any, where: str) -> tuple[str, Any]:
    if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
        raise RowError("a message lacks 'role' or 'content'", where, 'Write messages as {"role", "content"}.')
    return role_of(item["role"], where), item["content"]


def _content_parts(content: Any, images: Iterator[str], where: str) -> list[Part]:
    """Parts of a content list; an image part without an address takes the next of the row's `images`."""
    if isinstance(content, str):
        return [content]
    parts: list[Part] = []
    for item in content if isinstance(content, list) else ():
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "text":
            text = text_of(item.get("text"), "text", where)
            behind_picture = bool(parts) and isinstance(parts[-1], MediaRef)
            parts.append(f" {text}" if behind_picture and not text[:1].isspace() else text)
        elif kind in ("image", "image_url"):
            parts.append(MediaRef(_address(item, images, where)))
        else:
            raise RowError("a content part is neither text nor image", where, "Leave other parts out.", repr(kind))
    return parts


def _address(item: dict[str, Any], images: Iterator[str], where: str) -> str:
    keys = ("image_url", "image", "url", "path")
    address = next((item[key] for key in keys if item.get(key)), None) or next(images, None)
    address = address.get("url") or address.get("path") if isinstance(address, dict) else address
    return image_path(address, where)
