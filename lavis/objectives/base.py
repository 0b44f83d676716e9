"""The common part of all tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from lavis.config.recipe import Recipe
from lavis.config.schema import DataEntry
from lavis.core.errors import ConfigError
from lavis.core.paths import resolve
from lavis.core.registries import MODELS
from lavis.core.types import Batch
from lavis.data.assemble import load_tokenizer, make_template


class Task:
    """What a recipe trains.

    Subclasses name their architectures and say how the loss is counted and what is exported.
    """

    archs: ClassVar[tuple[str, ...]] = ()
    """Architectures the task can train."""
    generates: ClassVar[bool] = False
    """Whether the model answers prompts, so that test splits and sample prompts can be judged by generation."""

    def __init__(self, recipe: Recipe) -> None:
        if recipe.model.arch not in self.archs:
            raise ConfigError(
                f"task {recipe.run.task!r} trains {' or '.join(self.archs)}, but model.arch is {recipe.model.arch!r}."
            )
        self.recipe = recipe
        self.tokenizer = load_tokenizer(recipe.model)
        self.template = make_template(recipe.model, _first_entry(recipe), self.tokenizer)

    def build_model(self, device: torch.device, *, llm_on_cpu: bool = False) -> nn.Module:
        """The model on `device`, its weights loaded, frozen parts in the precision the recipe names and that suits
        `device`.
        """
        model = MODELS.get(self.recipe.model.arch).from_config(self.recipe.model, self.tokenizer, device=device)
        if not llm_on_cpu:
            return model.to(device)
        for name, part in model.named_children():
            if name != "llm_model":
                part.to(device)
        for p in model.parameters(recurse=False):
            p.data = p.data.to(device)
        return model

    def count(self, batch: Batch) -> int:
        """By how many units the loss sum of `batch` is to be divided."""
        return batch.supervised_tokens

    def frozen_files(self) -> dict[str, Path]:
        """Configuration key to file or folder of the weights that training does not change."""
        model: Any = self.recipe.model
        keys = ("llm_model", "pretrained", "vit_pretrained", "tokenizer")
        named = {k: resolve(v) for k in keys if (v := getattr(model, k, None))}
        return {k: path for k, path in named.items() if path.exists()}

    def export(self, model: nn.Module, folder: Path, dtype: torch.dtype) -> list[Path]:
        """Write what later recipes load from `folder`; returns the paths written."""
        raise NotImplementedError


def _first_entry(recipe: Recipe) -> DataEntry:
    """Says how rows are encoded; all of a recipe are of one kind, and pictures are the model's matter."""
    return next((entry for _, entry in recipe.data.entries() if entry.fraction is None), DataEntry())
