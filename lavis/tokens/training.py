"""Learning a tokenizer from the text of conversations."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lavis.config.recipe import Recipe
from lavis.core.registries import OBJECTIVES
from lavis.core.types import Document, Example, Pair

PAD_TOKEN, START_TOKEN, END_TOKEN, IMAGE_TOKEN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>"
"""ChatML's control tokens and Qwen's first reserved one, which stands for a vector of an image."""


@OBJECTIVES.register("tokenizer_training")
class TokenizerTraining:
    """Byte-level BPE with ChatML control tokens: any text can be written, nothing is unknown."""

    archs = ("byte_level_bpe",)

    def __init__(self, recipe: Recipe) -> None:
        self.config: Any = recipe.model

    def fit(self, examples: Iterable[Example]) -> PreTrainedTokenizerFast:
        """A tokenizer of at most `vocab_size` tokens learned from all texts."""
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = self._pre_tokenizer()
        bpe.decoder = decoders.ByteLevel()
        if self.config.add_prefix_space:
            bpe.normalizer = normalizers.Prepend(" ")
            bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(
            vocab_size=self.config.vocab_size,
            min_frequency=self.config.min_frequency,
            special_tokens=[PAD_TOKEN, START_TOKEN, END_TOKEN, IMAGE_TOKEN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        roles = ("system", "user", "assistant", "You are a helpful assistant.")
        texts = (text for example in examples for text in (*roles, *_texts(example)))
        bpe.train_from_iterator(texts, trainer)
        return PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            pad_token=PAD_TOKEN,
            eos_token=END_TOKEN,
            additional_special_tokens=[START_TOKEN, IMAGE_TOKEN],
            clean_up_tokenization_spaces=False,
        )

    def _pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if self.config.split_pattern is None:
            return byte_level
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(self.config.split_pattern), "isolated"), byte_level])

    def export(self, tokenizer: PreTrainedTokenizerFast, folder: Path) -> list[Path]:
        """A Hugging Face tokenizer folder."""
        tokenizer.save_pretrained(folder)
        return [folder]


def _texts(example: Example) -> list[str]:
    if isinstance(example, Document):
        return [example.text]
    if isinstance(example, Pair):
        return [*_texts(example.chosen), example.rejected.messages[-1].text]
    return [message.text for message in example.messages]
