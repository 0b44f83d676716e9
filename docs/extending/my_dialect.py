"""A dialect of annotations of one's own: multiple choice.

{"picture": "a.png", "question": "What is it?", "choices": ["a cat", "a dog"], "right": 1}
"""

from __future__ import annotations

from lavis.extend import DIALECTS, Conversation, MediaRef, Message, Row, RowError


@DIALECTS.register("multiple_choice")
class MultipleChoice:
    """The choices are lettered and put behind the question; the letter is the answer."""

    @staticmethod
    def matches(row: Row) -> bool:
        """Whether a row is of this dialect: what `format: auto` asks."""
        return "choices" in row

    @staticmethod
    def read(row: Row, where: str) -> Conversation:
        """A conversation of one question. Raises RowError, which `lavis data check` counts and training reports."""
        choices, right = row["choices"], row.get("right")
        if not isinstance(right, int) or not 0 <= right < len(choices):
            raise RowError("no right choice", where, f"Set `right` to 0 to {len(choices) - 1}.", repr(right))
        letters = [chr(ord("A") + i) for i in range(len(choices))]
        lettered = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
        asked = f"{row['question']}\n{lettered}"
        # a text behind a picture begins with one space; what the model is given there is up to its media format
        parts = (MediaRef(row["picture"]), f" {asked}") if row.get("picture") else (asked,)
        messages = (Message("user", parts), Message("assistant", (letters[right],)))
        return Conversation(messages, id=row.get("id", where), kind="choice")
