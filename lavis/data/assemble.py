"""From a recipe to tokenizer, template and prepared tables: the steps that training, checks and displays share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lavis.config.schema import DatasetConfig, ModelConfig
from lavis.core.errors import ConfigError, DataError
from lavis.core.paths import resolve
from lavis.core.registries import DATASETS
from lavis.data.builders import InstructionBuilder
from lavis.data.prepare import PreparedTable, prepare
from lavis.tokens.template import CaptionTemplate, ChatTemplate, ensure_image_token
from lavis.weights.gguf import gguf_arguments, is_gguf
from lavis.weights.qwen1_format import is_qwen1

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lavis.config.recipe import Recipe

Template = ChatTemplate | CaptionTemplate


def tokenizer_key(model: ModelConfig) -> tuple[str, str]:
    """The recipe's key that names the model's tokenizer, and its value. Raises ConfigError if the model has none."""
    key, name = model.tokenizer_source
    if name is None:
        raise ConfigError(f"model {model.arch!r} names no tokenizer: set {key}.")
    return key, name


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerFast:
    """The tokenizer of a recipe's model: from its folder, or by its name on the Hugging Face hub.

    Raises DataError, naming the folder and the key, if there is none.
    """
    from transformers import AutoTokenizer

    from lavis.tokens.qwen1 import qwen1_tokenizer

    key, name = tokenizer_key(model)
    folder = resolve(name)
    source = {"pretrained_model_name_or_path": str(folder if folder.exists() else name)}
    source = gguf_arguments(name) if is_gguf(name) else source
    try:
        tokenizer = (
            qwen1_tokenizer(folder)
            if is_qwen1(folder)
            else AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"no tokenizer could be loaded from {name!r} (looked in {folder}): {error}\n"
            f"Put the tokenizer's files there, or set {key} to their folder or hub name."
        ) from error
    if not tokenizer.is_fast:
        raise DataError(f"the tokenizer in {folder} is not a fast one: save a tokenizer.json beside it.")
    if model.chat_template:
        tokenizer.chat_template = model.chat_template
    if model.sees and model.row_format == "chat":
        ensure_image_token(tokenizer)
    return tokenizer


def make_template(model: ModelConfig, dataset: DatasetConfig, tokenizer: PreTrainedTokenizerFast) -> Template:
    """The template in which a dataset's conversations reach the model."""
    if dataset.sample_format == "caption":
        return CaptionTemplate(tokenizer, model.max_length)
    return ChatTemplate(tokenizer, model.tokens_per_tile, dataset.supervise, model.max_length)


def make_builders(recipe: Recipe) -> list[InstructionBuilder]:
    """The builders of a recipe's datasets, in its order."""
    return [DATASETS.get(name)(name, config) for name, config in recipe.datasets.items()]


def prepare_split(recipe: Recipe, split: str, tokenizer: PreTrainedTokenizerFast) -> list[PreparedTable]:
    """Prepared tables of `split`, one for each dataset that has it, in the recipe's order.

    Raises DataError if no dataset has it.
    """
    builders = [builder for builder in make_builders(recipe) if split in builder.splits]
    if not builders:
        have = "; ".join(f"{b.name}: {', '.join(b.splits) or 'none'}" for b in make_builders(recipe))
        raise DataError(
            f"no dataset of the recipe has a split {split!r} ({have}). Give its annotations or choose another split."
        )
    return [
        prepare(b, split, make_template(recipe.model, b.config, tokenizer), sample_format=b.config.sample_format)
        for b in builders
    ]
