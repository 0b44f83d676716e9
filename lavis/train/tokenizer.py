"""Training without steps: a tokenizer is learned in one go from the training splits."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from lavis.config.recipe import Recipe
from lavis.core.errors import ConfigError
from lavis.core.paths import cache_root
from lavis.data.assemble import examples_of
from lavis.runs.folder import SUMMARY, open_run_folder
from lavis.tokens.training import TokenizerTraining

log = logging.getLogger(__name__)


def train_tokenizer(recipe: Recipe) -> dict[str, Any]:
    """Learn the recipe's tokenizer and write it to export.path (under the cache folder); returns the summary that is
    also written to summary.json.
    """
    if not recipe.export.path:
        raise ConfigError("export.path is empty: name the folder (under cache/) that the tokenizer is written to.")
    started = time.perf_counter()
    folder = open_run_folder(recipe).path
    recipe.save(folder)
    training = TokenizerTraining(recipe)
    tokenizer = training.fit(examples_of(recipe, "train"))
    written = [str(p) for p in training.export(tokenizer, cache_root() / Path(recipe.export.path))]
    seconds = round(time.perf_counter() - started, 2)
    summary = {"vocab_size": len(tokenizer), "seconds": seconds, "written": written}
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1), encoding="utf-8")
    log.info("tokenizer of %d tokens in %.1f s: %s", len(tokenizer), seconds, written[0])
    return summary
