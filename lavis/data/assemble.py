"""From a recipe to tokenizer, template and prepared tables: the steps that training, checks and displays share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from lavis.config.schema import DataEntry, ModelConfig, ProcessorConfig
from lavis.core.errors import ConfigError, DataError
from lavis.core.paths import resolve
from lavis.core.registries import MEDIA_FORMATS, SOURCES
from lavis.core.types import Example
from lavis.data.fingerprint import ALL, Share, Template
from lavis.data.image import EvalImage, image_processor
from lavis.data.pool import usable_cores
from lavis.data.prepare import chosen, prepare
from lavis.data.sources import FileSource
from lavis.data.table import PreparedTable
from lavis.tokens.caption import CaptionTemplate
from lavis.tokens.chat_templates import chat_template_named
from lavis.tokens.document import DocumentTemplate
from lavis.tokens.media import MediaSpec
from lavis.tokens.pairs import PairTemplate, PromptTemplate
from lavis.tokens.template import ChatTemplate, ensure_image_token
from lavis.weights.gguf import gguf_arguments, is_gguf
from lavis.weights.qwen1_format import is_qwen1

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lavis.config.recipe import Recipe


def tokenizer_key(model: Any) -> tuple[str, str]:
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
        tokenizer.chat_template = chat_template_named(model.chat_template)
    fast = cast("PreTrainedTokenizerFast", tokenizer)
    if tokens_per_tile(model):
        ensure_image_token(fast)
    return fast


# ---- the model's pictures


def tokens_per_tile(model: Any) -> int:
    """Inputs of the LLM that a picture, or a tile of it, becomes; 0 where none stands in a text."""
    return model.tokens_per_tile if model.row_format == "chat" else 0


def media_processor(model: Any, *, training: bool = False) -> EvalImage:
    """What makes pixels of pictures for the model, in evaluation and chat or in training."""
    media = model.media
    name = (media.train_processor if training else None) or media.processor
    keys = ("mean", "std", "min_scale", "max_scale", "resize", "tiling", "max_tiles")
    values = {key: getattr(media, key) for key in keys}
    return image_processor(ProcessorConfig(name=name, image_size=model.tower.image_size, **values))


def media_spec(model: Any) -> MediaSpec | None:
    """How pictures reach the model; None if it reads text alone."""
    count = tokens_per_tile(model)
    if not count:
        return None
    return MediaSpec(MEDIA_FORMATS.get(model.media.format), count, media_processor(model))


# ---- templates


def make_template(model: Any, entry: DataEntry, tokenizer: PreTrainedTokenizerFast) -> Template:
    """The template in which an entry's rows reach the model."""
    if entry.kind == "caption":
        return CaptionTemplate(tokenizer, model.max_length)
    if entry.kind == "document":
        return DocumentTemplate(tokenizer, model.max_length)
    chat = ChatTemplate(tokenizer, media_spec(model), entry.supervise, model.max_length)
    if entry.kind == "pair":
        return PairTemplate(chat)
    return PromptTemplate(chat) if entry.kind == "prompt" else chat


# ---- entries


@dataclass(frozen=True)
class Portion:
    """Rows that a section of `data` names: an entry's source, or a share of it. processes: that prepare them."""

    section: str
    source: FileSource
    share: Share = ALL
    processes: int = 1

    @property
    def split(self) -> str:
        """Name of its results."""
        return self.source.split

    def prepare(self, model: Any, tokenizer: PreTrainedTokenizerFast) -> PreparedTable:
        """Its table, made if need be."""
        template = make_template(model, self.source.entry, tokenizer)
        return prepare(self.source, template, self.share, self.processes)


def portions(recipe: Recipe) -> list[Portion]:
    """All rows that a recipe names, in its order; entries with a `fraction` take theirs out of those of train."""
    taken = _taken(recipe)
    found: list[Portion] = []
    for section, entries in recipe.data.sections().items():
        for number, entry in enumerate(entries):
            key = f"data.{section}.{number}"
            if section == "train":
                share = (sum(f for which, f in taken.values() if number in which), 1.0)
                found.append(Portion(section, _source(entry, key, section), share if share[0] else ALL))
            elif entry.fraction is None:
                found.append(Portion(section, _source(entry, key, section)))
            else:
                found += _out_of_train(recipe, section, entry, key, taken)
    workers = recipe.data.prepare_workers
    processes = usable_cores() if workers is None else workers
    return [replace(portion, processes=processes) for portion in found]


def _source(entry: DataEntry, key: str, section: str) -> FileSource:
    return SOURCES.get(entry.source)(entry, key, entry.split or section)


def _taken(recipe: Recipe) -> dict[str, tuple[frozenset[int], float]]:
    """Key of an entry with a fraction to (numbers of the train entries it takes rows of, the fraction)."""
    train = recipe.data.train
    return {
        key: (frozenset(i for i, e in enumerate(train) if entry.name in (None, e.name, e.source)), entry.fraction)
        for key, entry in recipe.data.entries()
        if entry.fraction is not None
    }


def _out_of_train(
    recipe: Recipe, section: str, entry: DataEntry, key: str, taken: dict[str, tuple[frozenset[int], float]]
) -> list[Portion]:
    found = []
    for number in sorted(taken[key][0]):
        before = [f for other, (which, f) in taken.items() if number in which and _earlier(other, key, taken)]
        source = _source(recipe.data.train[number], f"data.train.{number}", "train")
        source.split = entry.split or section
        found.append(Portion(section, source, (sum(before), sum(before) + taken[key][1])))
    return found


def _earlier(one: str, other: str, order: dict[str, Any]) -> bool:
    keys = list(order)
    return keys.index(one) < keys.index(other)


def prepare_split(recipe: Recipe, split: str, tokenizer: PreTrainedTokenizerFast) -> list[PreparedTable]:
    """Prepared tables of a section of `data`, or of the entries whose results are called `split`, in order.

    Raises DataError if there is none.
    """
    return [portion.prepare(recipe.model, tokenizer) for portion in named_portions(recipe, split)]


def named_portions(recipe: Recipe, split: str) -> list[Portion]:
    """The portions of a section, else those whose results are called `split`. Raises DataError if there is none."""
    everything = portions(recipe)
    found = [p for p in everything if p.section == split] or [p for p in everything if p.split == split]
    if not found:
        have = ", ".join(dict.fromkeys(p.split for p in everything)) or "none"
        raise DataError(f"no dataset of the recipe has a split {split!r} (there are: {have}). Choose another.")
    return found


def examples_of(recipe: Recipe, split: str) -> Iterator[Example]:
    """The rows of a section of `data`, or of what its results call `split`; the first bad one is raised."""
    for portion in named_portions(recipe, split):
        yield from chosen(portion.source, portion.share)
