"""Templates of rows that are not learned as they stand: pairs of answers, and prompts."""

from __future__ import annotations

from collections.abc import Sequence

from lavis.core.types import Conversation, Pair, RowError, Sample
from lavis.tokens.media import MediaSpec
from lavis.tokens.template import ChatTemplate


class _OverChat:
    """What a template has from the chat template that it encodes with."""

    def __init__(self, chat: ChatTemplate) -> None:
        self.chat, self.tokenizer = chat, chat.tokenizer
        self.pad_token_id, self.stop_token_ids = chat.pad_token_id, chat.stop_token_ids

    @property
    def media(self) -> MediaSpec | None:
        """How pictures reach the model."""
        return self.chat.media

    @property
    def image_token_id(self) -> int:
        return self.chat.image_token_id

    def fingerprint(self) -> str:
        """Hex digest of all that decides how a row is encoded."""
        return f"{type(self).__name__}-1-{self.chat.fingerprint()}"

    def encode_prompt(self, conversation: Conversation) -> Sample:
        return self.chat.encode_prompt(conversation)


class PairTemplate(_OverChat):
    """A chosen and a rejected answer to the same prompt: of either, the last answer alone is supervised."""

    def encode_many(self, pairs: Sequence[Pair]) -> list[tuple[Sample, Sample] | RowError]:
        """(chosen, rejected) of each pair; a failure stands in its place."""
        both = [c for pair in pairs for c in (pair.chosen, pair.rejected)]
        samples = self.chat.encode_many(both, last_answer_only=True)
        return [_together(chosen, rejected) for chosen, rejected in zip(samples[::2], samples[1::2], strict=True)]


class PromptTemplate(_OverChat):
    """The prompt of a conversation, nothing of which is supervised."""

    def encode_many(self, conversations: Sequence[Conversation]) -> list[Sample | RowError]:
        """The prompt of each; a failure stands in its place."""
        return [self._prompt(conversation) for conversation in conversations]

    def _prompt(self, conversation: Conversation) -> Sample | RowError:
        try:
            return self.chat.encode_prompt(conversation)
        except RowError as error:
            return error


def _together(chosen: Sample | RowError, rejected: Sample | RowError) -> tuple[Sample, Sample] | RowError:
    if isinstance(chosen, RowError):
        return chosen
    return rejected if isinstance(rejected, RowError) else (chosen, rejected)
