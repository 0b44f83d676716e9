"""Text processors.

They act before tokenising: `base_instruction` on questions and answers, `blip_caption` on captions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lavis.config.schema import ProcessorConfig, TextConfig
from lavis.core.errors import ConfigError
from lavis.core.registries import PROCESSORS


@PROCESSORS.register("base_instruction")
@dataclass(frozen=True)
class BaseInstruction:
    """Leaves text as it is, but for an optional `prompt` before it and an optional limit of `max_words` words."""

    max_words: int | None = None
    prompt: str = ""

    @classmethod
    def from_config(cls, config: ProcessorConfig | TextConfig) -> BaseInstruction:
        """The processor that a recipe's section describes."""
        return cls(config.max_words, config.prompt or "")

    def __call__(self, text: str) -> str:
        return self.prompt + _first_words(text, self.max_words)


@PROCESSORS.register("blip_caption")
@dataclass(frozen=True)
class BlipCaption(BaseInstruction):
    """LAVIS's caption clean-up: lower case, punctuation to spaces, spaces to one; then as `base_instruction`."""

    def __call__(self, text: str) -> str:
        text = re.sub(r"([.!\"()*#:;~])", " ", text.lower())
        text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
        return super().__call__(text)


def text_processor(config: ProcessorConfig | TextConfig) -> BaseInstruction:
    """The text processor that a recipe's section describes. Raises ConfigError if it names one of images."""
    processor = PROCESSORS.get(config.name)
    if not issubclass(processor, BaseInstruction):
        raise ConfigError(
            f"the processor {config.name!r} is not for texts: name another one in text_processor, such as"
            " base_instruction."
        )
    return processor.from_config(config)


def _first_words(text: str, max_words: int | None) -> str:
    words = text.split(" ")
    return text if max_words is None or len(words) <= max_words else " ".join(words[:max_words])
