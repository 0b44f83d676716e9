"""What turns a recipe's conversations into ids, and ids into text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lavis.config.schema import DataEntry
from lavis.data.assemble import Template, load_tokenizer, make_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lavis.config.recipe import Recipe


@dataclass(frozen=True)
class Texts:
    """Tokenizer and template of a recipe's model."""

    tokenizer: PreTrainedTokenizerFast
    template: Template

    @classmethod
    def of(cls, recipe: Recipe) -> Texts:
        """Those that `recipe` names."""
        tokenizer = load_tokenizer(recipe.model)
        return cls(tokenizer, make_template(recipe.model, _asking(recipe), tokenizer))


def _asking(recipe: Recipe) -> DataEntry:
    """The entry in whose form questions are put: the first of conversations or captions."""
    kind = "caption" if recipe.model.row_format == "caption" else "conversation"
    entries = (entry for _, entry in recipe.data.entries() if entry.fraction is None)
    return next((entry for entry in entries if entry.kind == kind), DataEntry(kind=kind))
