"""Text to token ids such that no text, whatever a user types into it, becomes a control token."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Set
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def special_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Ids of the tokenizer's control tokens.

    The unknown token is none of them, unless it has another office as well.
    """
    named = {getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "cls", "sep", "mask")} - {None}
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(named | ({*added, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}))


class TextEncoder:
    """Encodes plain text with the model of `tokenizer`, never yielding an id in `forbidden`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, forbidden: Set[int]) -> None:
        # A copy: its settings differ, and transformers changes those of the original at every call.
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.encode_special_tokens = True  # spelled-out special tokens are read as ordinary characters
        self._backend.no_truncation()
        self._backend.no_padding()
        self._forbidden = forbidden

    def encode(self, text: str) -> list[int]:
        return self.encode_all([text])[text]

    def encode_all(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Each distinct text with its token ids."""
        distinct = list(dict.fromkeys(texts))
        # half a surrogate pair, as JSON can spell it, is no character
        whole = [text.encode("utf-8", "replace").decode() for text in distinct]
        encodings = self._backend.encode_batch_fast(whole, add_special_tokens=False)
        ids = {text: encoding.ids for text, encoding in zip(distinct, encodings, strict=True)}
        clean = dict(zip(distinct, whole, strict=True))
        return {
            text: i if self._forbidden.isdisjoint(i) else self._encode_broken(clean[text]) for text, i in ids.items()
        }

    def _encode_broken(self, text: str) -> list[int]:
        """Encode piecewise, cut behind the first character of whatever became a control token.

        Needed where the setting above does not help: Unigram models whose vocabulary spells a control token, and
        control
        tokens that were added as ordinary ones.
        """
        done: list[int] = []
        pieces = [text]
        while pieces:
            piece = pieces.pop()
            encoding = self._backend.encode(piece, add_special_tokens=False)
            found = [encoding.offsets[i] for i, token in enumerate(encoding.ids) if token in self._forbidden]
            if not found:
                done += encoding.ids
                continue
            borders = [0, *(start + 1 for start, _ in found), len(piece)]
            # a single character that is a control token has no other spelling: it is left out
            single = {start for start, end in found if end - start <= 1}
            cut = [piece[a : b - (b - 1 in single)] for a, b in itertools.pairwise(borders)]
            pieces += [p for p in reversed(cut) if p]
        return done


def digest(version: str, tokenizer: PreTrainedTokenizerFast, *settings: object) -> str:
    """Hex digest of `settings` and of all that decides how `tokenizer` encodes."""
    named = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    content = repr((version, settings, named)) + tokenizer.backend_tokenizer.to_str()
    return hashlib.sha256(content.encode()).hexdigest()
