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
from lavis.core.registries import RUNNERS, TASKS
from lavis.data.assemble import examples_of
from lavis.runs.folder import SUMMARY, open_run_folder

log = logging.getLogger(__name__)


@RUNNERS.register("tokenizer_runner")
class TokenizerRunner:
    """Fits the task's tokenizer and writes it to run.export (under the cache folder)."""

    def __init__(self, recipe: Recipe) -> None:
        if not recipe.run.export:
            raise ConfigError("run.export is empty: name the folder (under cache/) that the tokenizer is written to.")
        self.recipe = recipe

    def run(self) -> dict[str, Any]:
        """Learn and write the tokenizer; returns the summary that is also written to summary.json."""
        started = time.perf_counter()
        folder = open_run_folder(self.recipe).path
        (folder / "config.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")
        task = TASKS.get(self.recipe.run.task)(self.recipe)
        tokenizer = task.fit(examples_of(self.recipe, "train"))
        assert self.recipe.run.export
        written = task.export(tokenizer, cache_root() / Path(self.recipe.run.export))
        summary = {
            "vocab_size": len(tokenizer),
            "seconds": round(time.perf_counter() - started, 2),
            "written": [str(p) for p in written],
        }
        (folder / SUMMARY).write_text(json.dumps(summary, indent=1), encoding="utf-8")
        log.info("tokenizer of %d tokens in %.1f s: %s", len(tokenizer), summary["seconds"], summary["written"][0])
        return summary
