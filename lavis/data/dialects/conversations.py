"""LLaVA's rows and ShareGPT's: `conversations`, a list of `{"from", "value"}`."""

from __future__ import annotations

from lavis.core.registries import DIALECTS
from lavis.core.types import Conversation, RowError
from lavis.data.dialects.turns import BARE_TAG, Turn, place_images
from lavis.data.dialects.values import images_of, labels_of, list_of, role_of, text_of
from lavis.data.files import Row


class _Conversations:
    @staticmethod
    def read(row: Row, where: str) -> Conversation:
        turns = turns_of(row, where)
        return Conversation(tuple(place_images(turns, images_of(row, where), BARE_TAG, where)), **labels_of(row, where))


@DIALECTS.register("llava")
class Llava(_Conversations):
    """With pictures: `<image>` in a value stands for one."""

    @staticmethod
    def matches(row: Row) -> bool:
        return "conversations" in row and ("image" in row or "images" in row)


@DIALECTS.register("sharegpt")
class ShareGPT(_Conversations):
    """Text alone."""

    @staticmethod
    def matches(row: Row) -> bool:
        return "conversations" in row and not ("image" in row or "images" in row)


def turns_of(row: Row, where: str) -> list[Turn]:
    """The turns under `conversations`."""
    return [turn_of(turn, where) for turn in list_of(row, "conversations", where)]


def turn_of(turn: object, where: str) -> Turn:
    """One `{"from", "value"}`."""
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise RowError("a turn lacks 'from' or 'value'", where, 'Write turns as {"from": "human", "value": "..."}.')
    return role_of(turn["from"], where), text_of(turn["value"], "value", where)
