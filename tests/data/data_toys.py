"""A small chat tokenizer for the data tests."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lavis.core.registries import MEDIA_FORMATS
from lavis.tokens.media import MediaSpec, Tiles

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>"]


def small_tokenizer(
    specials: list[str] = SPECIALS, eos: str = "<|im_end|>", **options: object
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that knows a few whole words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    words = ["user", "assistant", "system", "Hi", "yes", "no", "red", "What"] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=specials)
    )
    extra = [s for s in specials if s != eos]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, extra_special_tokens=extra, **options)


def media(tokens_per_tile: int, name: str = "minigpt4qwen", processor: Tiles | None = None) -> MediaSpec:
    """Pictures of so many vectors a tile, in the media format `name`."""
    return MediaSpec(MEDIA_FORMATS.get(name), tokens_per_tile, processor)
