"""Documents: their tokens one after the other, cut into blocks of equal length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from lavis.core.errors import DataError
from lavis.core.types import IGNORE_INDEX, Document, Sample
from lavis.tokens.text_encoder import TextEncoder, digest, special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CHUNK = 1000
END_OF_TEXT = "<|endoftext|>"
"""Ends a document where the tokenizer has it: chat models end a turn, not a text, with their end-of-sequence token."""


class DocumentTemplate:
    """Encodes documents: begin token where the tokenizer has one of its own, text, end token.

    Nothing is truncated: blocks of `max_length` tokens hold each token of each document once; the last is shorter.
    All tokens are supervised but the first of each piece of a document, which nothing in its block predicts.
    """

    image_token_id: int | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        end = tokenizer.backend_tokenizer.token_to_id(END_OF_TEXT)
        end = tokenizer.eos_token_id if end is None else end
        if end is None:
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path!r} has no token that ends a document: neither {END_OF_TEXT} nor"
                " an end-of-sequence token. Choose another tokenizer."
            )
        self.end_token_id: int = end
        self.pad_token_id: int = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.stop_token_ids = (end,)
        bos = tokenizer.bos_token_id
        self._begin = (bos,) if bos is not None and tokenizer("").input_ids[:1] == [bos] else ()
        self._encoder = TextEncoder(tokenizer, special_ids(tokenizer) | {end})

    def fingerprint(self) -> str:
        """Hex digest of all that decides how documents are encoded."""
        return digest("document-1", self.tokenizer, self.max_length)

    def blocks(self, documents: Iterable[Document]) -> Iterator[tuple[Sample, list[str]]]:
        """Blocks in order, each with the ids of the documents it holds a piece of."""
        return self.cut(self.tokens(documents))

    def cut(self, documents: Iterable[tuple[str, list[int]]]) -> Iterator[tuple[Sample, list[str]]]:
        """As `blocks`, of what `tokens` made of the documents."""
        ids: list[int] = []
        pieces: list[tuple[str, int]] = []
        for name, tokens in documents:
            start = 0
            while start < len(tokens):
                piece = tokens[start : start + self.max_length - len(ids)]
                start += len(piece)
                ids += piece
                pieces.append((name, len(piece)))
                if len(ids) == self.max_length:
                    yield _block(ids, pieces)
                    ids, pieces = [], []
        if ids:
            yield _block(ids, pieces)

    def tokens(self, documents: Iterable[Document]) -> Iterator[tuple[str, list[int]]]:
        """The id of each document with all of its tokens, begin and end included."""
        iterator = iter(documents)
        while chunk := list(islice(iterator, _CHUNK)):
            encoded = self._encoder.encode_all(document.text for document in chunk)
            for document in chunk:
                yield document.id, [*self._begin, *encoded[document.text], self.end_token_id]


def _block(ids: Sequence[int], pieces: Sequence[tuple[str, int]]) -> tuple[Sample, list[str]]:
    labels: list[int] = []
    for _, length in pieces:
        labels += [IGNORE_INDEX, *ids[len(labels) + 1 : len(labels) + length]]
    sample = Sample(tuple(ids), tuple(labels), parts=tuple(length for _, length in pieces))
    return sample, [name for name, _ in pieces]
