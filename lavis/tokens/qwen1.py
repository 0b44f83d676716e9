"""The tokenizer of first-generation Qwen: its tiktoken vocabulary as a fast tokenizer, token for token the same."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from tokenizers import AddedToken
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from lavis.core.errors import DataError
from lavis.tokens.layout import CHATML

VOCABULARY = "qwen.tiktoken"
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, START, END, *(f"<|extra_{i}|>" for i in range(205)))
"""They follow the vocabulary, in this order."""
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%"
    " endif %}" + CHATML
)


def qwen1_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """The tokenizer whose vocabulary is `folder`/qwen.tiktoken, with ChatML; it pads with `<|endoftext|>` and ends at
    `<|im_end|>`.

    Qwen2's class, since the two cut text in the same way. Raises DataError for a missing or damaged vocabulary.
    """
    vocabulary, merges = _Converter().extract_vocab_merges_from_model(str(folder / VOCABULARY))
    vocabulary |= {token: i for i, token in enumerate(SPECIAL_TOKENS, start=len(vocabulary))}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=None,  # type: ignore[arg-type]  # bytes spell everything: none is needed
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        name_or_path=str(folder),
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def read_ranks(file: Path) -> dict[bytes, int]:
    """Token to id of a tiktoken file, whose lines are a token in base64 and its id.

    Raises DataError naming the line.
    """
    if not file.is_file():
        raise DataError(
            f"{file} does not exist: a first-generation Qwen folder needs its vocabulary. Put {file.name} there."
        )
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(
                f"{file}, line {number} is no base64 token with its number: {error}. Download the file again."
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not {bytes([b]) for b in range(256)} <= ranks.keys():
        raise DataError(
            f"{file} is incomplete: its tokens are not numbered from 0 without a gap, or lack one of the 256 bytes."
            " Download it again."
        )
    return ranks


class _Converter(TikTokenConverter):
    """transformers' way from ranks to merges, without its need for the tiktoken package."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        return read_ranks(Path(tiktoken_url))
