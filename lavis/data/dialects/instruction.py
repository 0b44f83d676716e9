"""MiniGPT4Qwen's rows and Alpaca's: `instruction` and `output`, each a text, or lists of turns of equal length."""

from __future__ import annotations

from lavis.core.registries import DIALECTS
from lavis.core.types import Conversation, RowError
from lavis.data.dialects.turns import TAG, place_images
from lavis.data.dialects.values import images_of, labels_of, text_of, texts_of
from lavis.data.files import Row


@DIALECTS.register("minigpt4qwen")
class MiniGPT4Qwen:
    """`{"image", "instruction", "output"}`."""

    @staticmethod
    def matches(row: Row) -> bool:
        return "instruction" in row and "input" not in row

    @staticmethod
    def read(row: Row, where: str) -> Conversation:
        asked, answered = (texts_of(row, key, where) for key in ("instruction", "output"))
        if len(asked) != len(answered):
            raise RowError(
                "instruction and output differ in length",
                where,
                "Give one output for each instruction.",
                f"{len(asked)} instructions, {len(answered)} outputs",
            )
        if row.get("input"):
            asked[0] = f"{asked[0]}\n{text_of(row['input'], 'input', where)}"
        turns = [m for q, a in zip(asked, answered, strict=True) for m in (("user", q), ("assistant", a))]
        if row.get("system"):
            turns.insert(0, ("system", text_of(row["system"], "system", where)))
        messages = place_images(turns, images_of(row, where), TAG, where)
        return Conversation(tuple(messages), **labels_of(row, where))


@DIALECTS.register("alpaca")
class Alpaca(MiniGPT4Qwen):
    """`{"instruction", "input", "output"}`: the input follows the instruction."""

    @staticmethod
    def matches(row: Row) -> bool:
        return "instruction" in row and "input" in row
