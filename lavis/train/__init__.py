"""One training loop, and what it is made of: schedules, optimiser, strategies, checkpoints, metrics, report."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lavis.config.recipe import Recipe


def train_recipe(recipe: Recipe) -> int:
    """Do what the recipe's `run` section says (train, or only evaluate) and return the exit code.

    One of several ranks ends its process with it.
    """
    from lavis.core.registries import RUNNERS

    RUNNERS.get(recipe.run.runner)(recipe).run()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # All is written and all ranks have met. At an ordinary end, threads of gloo and DeepSpeed now and then abort
        # the process (exit code -6).
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0
