"""What turns a recipe's conversations into ids, and ids into text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
        return cls(tokenizer, make_template(recipe.model, next(iter(recipe.datasets.values())), tokenizer))
