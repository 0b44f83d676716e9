"""Rows with a prompt: with a chosen and a rejected answer to it, or with none.

The prompt is `prompt` (a text or messages), `instruction` with `input` (Alpaca), or `conversations` (ShareGPT). An
answer is a text, a message, or the list of messages it ends; without a prompt, what both
lists begin with is the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lavis.core.registries import DIALECTS
from lavis.core.types import Conversation, Message, Pair, RowError
from lavis.data.dialects.conversations import turn_of, turns_of
from lavis.data.dialects.messages import read_messages
from lavis.data.dialects.turns import BARE_TAG, TAG, message, place_images
from lavis.data.dialects.values import images_of, labels_of, text_of, texts_of
from lavis.data.files import Row


@DIALECTS.register("preference")
class Preference:
    """`{"prompt", "chosen", "rejected"}`."""

    @staticmethod
    def matches(row: Row) -> bool:
        return "chosen" in row and "rejected" in row

    @staticmethod
    def read(row: Row, where: str) -> Pair:
        images, labels = images_of(row, where), labels_of(row, where)
        prompt = _prompt(row, images, where)
        chosen, rejected = (_whole(prompt, row[key], key, images, where) for key in ("chosen", "rejected"))
        if chosen[:-1] != rejected[:-1]:
            fix = "Let chosen and rejected differ in the last answer alone."
            raise RowError("the two answers have different prompts", where, fix)
        return Pair(Conversation(chosen, **labels), Conversation(rejected, **labels))


@DIALECTS.register("prompt")
class Prompt:
    """`{"prompt"}`; an `answer` beside it is kept as what a right answer is."""

    @staticmethod
    def matches(row: Row) -> bool:
        return "prompt" in row and "chosen" not in row

    @staticmethod
    def read(row: Row, where: str) -> Conversation:
        messages = _prompt(row, images_of(row, where), where)
        answer = row.get("answer", row.get("solution"))
        if answer is not None:
            messages = (*messages, Message("assistant", (str(answer),)))
        return Conversation(messages, **labels_of(row, where))


def _prompt(row: Row, images: list[str], where: str) -> tuple[Message, ...]:
    readers: dict[str, Callable[[], list[Message]]] = {
        "prompt": lambda: _messages(row["prompt"], "user", "prompt", images, where),
        "conversations": lambda: place_images(turns_of(row, where), images, BARE_TAG, where),
        "instruction": lambda: place_images([("user", _asked(row, where))], images, TAG, where),
    }
    return next((tuple(read()) for key, read in readers.items() if key in row), ())


def _asked(row: Row, where: str) -> str:
    (asked,) = texts_of(row, "instruction", where)
    return f"{asked}\n{text_of(row['input'], 'input', where)}" if row.get("input") else asked


def _whole(prompt: tuple[Message, ...], answer: Any, key: str, images: list[str], where: str) -> tuple[Message, ...]:
    """Prompt and answer as one dialogue; an answer's list of messages may hold the prompt as well."""
    messages = tuple(_messages(answer, "assistant", key, [] if prompt else images, where))
    whole = messages if messages[: len(prompt)] == prompt else (*prompt, *messages)
    if not whole or whole[-1].role != "assistant":
        raise RowError(f"{key!r} does not end with an answer", where, "End it with the assistant's turn.")
    return whole


def _messages(value: Any, role: str, key: str, images: list[str], where: str) -> list[Message]:
    """A text as one message of `role`; a message, or a list of them, as it says."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        text = text_of(value, key, where)
        return place_images([(role, text)], images, BARE_TAG, where) if role == "user" else [message(role, [text])]
    if value and isinstance(value[0], dict) and "from" in value[0]:
        return place_images([turn_of(turn, where) for turn in value], images, BARE_TAG, where)
    return read_messages(value, images, where)
