"""One training loop, and what it is made of: schedules, optimiser, strategies, checkpoints, metrics, report."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lavis.common.config import Recipe


def train_recipe(recipe: Recipe) -> int:
    """Do what the recipe's `run` section says (train, or only evaluate) and return the exit code."""
    from lavis.common.registries import RUNNERS

    RUNNERS.get(recipe.run.runner)(recipe).run()
    return 0
