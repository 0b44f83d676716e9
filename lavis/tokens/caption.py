"""Captions: text alone, with its picture beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lavis.core.errors import DataError
from lavis.core.types import IGNORE_INDEX, Conversation, MediaSpan, RowError, Sample
from lavis.tokens.text_encoder import TextEncoder, digest, special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class CaptionTemplate:
    """Encodes the last answer of a conversation alone: start token, caption, end token; the images stay beside it.

    Start and end are bos (or cls) and eos (or sep); a tokenizer with neither bos nor cls starts with `<|im_start|>` and
    ends with `<|im_end|>`. The caption and the end token are supervised. There are no image placeholders.
    """

    image_token_id: int | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.start_token_id, self.end_token_id = _caption_ends(tokenizer)
        pad = tokenizer.pad_token_id
        self.pad_token_id = self.end_token_id if pad is None else pad
        self.stop_token_ids = (self.end_token_id,)
        forbidden = special_ids(tokenizer) | {self.start_token_id, self.end_token_id}
        self._encoder = TextEncoder(tokenizer, forbidden)

    def fingerprint(self) -> str:
        """Hex digest of all that decides how a conversation is encoded."""
        return digest("caption-1", self.tokenizer, self.max_length)

    def encode(self, conversation: Conversation) -> Sample:
        """The caption, cut to max_length tokens with its start and end. Raises RowError if there is not one image."""
        sample = self.encode_many([conversation])[0]
        if isinstance(sample, RowError):
            raise sample
        return sample

    def encode_many(self, conversations: Sequence[Conversation]) -> list[Sample | RowError]:
        """`encode` for many conversations at once; a failure stands in its conversation's place."""
        texts = [c.messages[-1].text for c in conversations]
        encoded = self._encoder.encode_all(texts)
        samples: list[Sample | RowError] = []
        for conversation, text in zip(conversations, texts, strict=True):
            if len(conversation.images) != 1:
                have = f"{len(conversation.images)} images"
                samples.append(
                    RowError(
                        "a caption without its one image",
                        conversation.id,
                        "Give the row one image, or take it out.",
                        have,
                    )
                )
                continue
            caption = (*encoded[text][: self.max_length - 2], self.end_token_id)
            labels = (IGNORE_INDEX, *caption)
            samples.append(Sample((self.start_token_id, *caption), labels, _beside(conversation)))
        return samples

    def encode_prompt(self, conversation: Conversation) -> Sample:
        """The start token and the images."""
        return Sample((self.start_token_id,), (IGNORE_INDEX,), _beside(conversation))


def _beside(conversation: Conversation) -> tuple[MediaSpan, ...]:
    return tuple(MediaSpan(ref, 0, 0) for ref in conversation.media)


def _caption_ends(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    start = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if start is None:
        start, end = map(tokenizer.backend_tokenizer.token_to_id, ("<|im_start|>", "<|im_end|>"))
    if start is None or end is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no tokens that begin and end a caption: bos and eos, cls and"
            " sep, or <|im_start|> and <|im_end|>. Choose another tokenizer."
        )
    return start, end
