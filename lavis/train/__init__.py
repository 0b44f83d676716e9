"""Training and evaluation of a recipe: one loop with callbacks, and what it is made of."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

from lavis.core.collection import no_collection

if TYPE_CHECKING:
    from lavis.config.recipe import Recipe


def train_recipe(recipe: Recipe) -> int:
    """Do what the recipe's `run` section says (train, or only evaluate) and return the exit code.

    One of several ranks ends its process with it.
    """
    with no_collection():
        from lavis.train.run import run_recipe

    run_recipe(recipe)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # All is written and all ranks have met. At an ordinary end, threads of gloo and DeepSpeed now and then abort
        # the process (exit code -6).
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0
