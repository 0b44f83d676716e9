"""What the dialects of conversations share: pictures into their turns, and the form that every conversation has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from lavis.core.types import IMAGE_TAG, Conversation, MediaRef, Message, RowError
from lavis.tokens.media import Part, joined

Turn = tuple[str, str]
"""Role and text."""
TAG = re.compile(rf"<Img>\s*{re.escape(IMAGE_TAG)}\s*</Img>|{re.escape(IMAGE_TAG)}")
"""MiniGPT4Qwen's: what it writes around a picture belongs to its media format, not to the text."""
BARE_TAG = re.compile(r"<image>[\n ]?")
"""LLaVA's, with the separator that may follow."""


def place_images(turns: Sequence[Turn], images: Sequence[str], tag: re.Pattern[str], where: str) -> list[Message]:
    """Put the images where user turns hold `tag`; without any tag, before the first user turn."""
    found = sum(len(tag.findall(text)) for role, text in turns if role == "user")
    if found and found != len(images):
        fix = "Give one tag for each image, or none to put the images first."
        raise RowError("image tags and images differ in number", where, fix, f"{found} tags, {len(images)} images")
    rest = iter(images)
    messages = []
    for role, text in turns:
        parts: list[Part] = [text]
        if role == "user" and found:
            parts = _split_at_tags(text, rest, tag)
        elif role == "user":
            pictures = [MediaRef(path) for path in rest]
            parts = [*pictures, " " if pictures else "", text]
        messages.append(message(role, parts))
    return messages


def message(role: str, parts: Sequence[Part]) -> Message:
    """A message of `parts`, neighbouring texts made one."""
    return Message(role, tuple(joined(parts)) or ("",))  # type: ignore[arg-type]


def _split_at_tags(text: str, images: Iterator[str], tag: re.Pattern[str]) -> list[Part]:
    """MiniGPT4Qwen's text behind a tag is kept as it is; LLaVA's separator becomes the space that stands for one."""
    pieces = tag.split(text)
    gap = " " if tag is BARE_TAG else ""
    parts: list[Part] = [pieces[0]]
    for piece in pieces[1:]:
        parts += [MediaRef(next(images)), gap + piece if piece else ""]
    return parts


def well_formed(conversation: Conversation, where: str, *, answered: bool = True) -> Conversation:
    """The conversation in the form that all have; `answered` is False for a prompt, which ends with a user turn.

    At most one system message, first; then user and assistant turns alternate, beginning with the user and ending with
    the assistant. A leading assistant turn is dropped, and so is a trailing unanswered user turn.
    Raises RowError where that cannot be had, for empty answers, and for pictures outside user turns.
    """
    messages = list(conversation.messages)
    _check_parts(messages, where)
    system = messages[:1] if messages and messages[0].role == "system" else []
    turns = messages[len(system) :]
    if turns and turns[0].role == "assistant":
        turns = turns[1:]
    if answered and turns and turns[-1].role == "user":
        turns = turns[:-1]
    if not turns:
        raise RowError("no question with an answer", where, "Give at least one user turn and its answer.")
    for i, turn in enumerate(turns):
        _check_turn(i, turn, where)
    return replace(conversation, messages=(*system, *turns))


def _check_parts(messages: Sequence[Message], where: str) -> None:
    """A dialect may hand on what the file holds, of whatever type."""
    for i, part in ((i, part) for i, message in enumerate(messages) for part in message.parts):
        content = part.path if isinstance(part, MediaRef) else part
        if not isinstance(content, str):
            what = "the path of a picture" if isinstance(part, MediaRef) else "a part of a message"
            raise RowError(
                f"{what} is not text ({type(content).__name__})", where, "Give a string.", f"message {i + 1}"
            )


def _check_turn(i: int, turn: Message, where: str) -> None:
    if turn.role != ("user", "assistant")[i % 2]:
        fix = "Let user and assistant turns alternate; a system message comes first."
        raise RowError("turns do not alternate", where, fix, f"turn {i + 1} is {turn.role}")
    if turn.role == "assistant" and not turn.text.strip():
        raise RowError("an answer is empty", where, "Fill or delete it.", f"turn {i + 1}")
    if turn.role != "user" and any(isinstance(p, MediaRef) for p in turn.parts):
        raise RowError("an image outside a user turn", where, "Move it to a user turn.", f"turn {i + 1}")
