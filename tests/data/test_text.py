"""Text processors."""

from __future__ import annotations

import pytest

from lavis.config.schema import ProcessorConfig, TextProcessorConfig
from lavis.core.errors import ConfigError
from lavis.core.registries import PROCESSORS
from lavis.data.text import text_processor


def test_base_instruction_leaves_text_as_it_is() -> None:
    assert PROCESSORS.get("base_instruction").from_config(TextProcessorConfig())("A  b, C!\n") == "A  b, C!\n"


def test_prompt_and_word_limit() -> None:
    processor = PROCESSORS.get("base_instruction").from_config(ProcessorConfig(prompt="Look: ", max_words=2))
    assert processor("one two three") == "Look: one two"


def test_blip_caption_cleans_up() -> None:
    processor = PROCESSORS.get("blip_caption").from_config(ProcessorConfig(prompt="a photo of "))
    assert processor('A "Red"  Dog.\n') == "a photo of a red dog"


def test_an_image_processor_is_refused() -> None:
    with pytest.raises(ConfigError, match="not for texts"):
        text_processor(TextProcessorConfig(name="blip2_image_eval"))
