"""The folder of a run, and from where a run goes on."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lavis.config.compat.model import FROZEN
from lavis.config.recipe import Recipe, recipe_from_dict
from lavis.core.errors import CheckpointError, ConfigError
from lavis.runs.checkpoint import Checkpoint, find_checkpoint, newest_run

log = logging.getLogger(__name__)

SUMMARY = "summary.json"
"""Written when a run has ended."""

_JUDGED = ("valid", "test")
"""Sections that may change, but not in what they take out of the training data."""


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes, and the checkpoint it starts from (None: from nothing)."""

    path: Path
    checkpoint: Checkpoint | None


def open_run_folder(recipe: Recipe) -> RunFolder:
    """A new folder named by the time under run.output_dir, or that of the run which run.resume goes on with.

    `resume: auto` takes the newest unfinished run of the same recipe, and starts from nothing when there is none.
    Raises CheckpointError when a run named by path is missing or was made by another recipe.
    """
    output_dir = Path(recipe.run.output_dir).absolute()
    checkpoint: Checkpoint | None
    if recipe.run.resume not in ("auto", "never"):
        checkpoint = find_checkpoint(Path(recipe.run.resume).absolute())
        if differences := recipe_differences(recipe, checkpoint.path / "config.yaml"):
            raise CheckpointError(
                f"{checkpoint.path} was made by another recipe; these keys differ: {', '.join(differences)}. "
                "Resume with the recipe it was made with, or load its trained weights through `init`."
            )
    elif recipe.run.resume == "auto":
        checkpoint = newest_run(output_dir, lambda folder: _unfinished_of(recipe, folder))
    else:
        checkpoint = None
    if recipe.run.evaluate and recipe.run.resume == "auto" and not checkpoint:
        raise CheckpointError(
            f"no run of this recipe under {output_dir} has a checkpoint to evaluate: train first, or name a run in"
            " run.resume."
        )
    if checkpoint and not recipe.run.evaluate:
        return RunFolder(checkpoint.path.parent.parent, checkpoint)
    return RunFolder(_new_folder(output_dir), checkpoint)


def recipe_differences(recipe: Recipe, saved: Path) -> list[str]:
    """Keys, among those that matter for going on, in which `recipe` differs from the resolved recipe in the file
    `saved`.
    """
    old, new = recipe_from_dict(yaml.safe_load(saved.read_text(encoding="utf-8"))), recipe
    before, now = old.kept_on_resume(), new.kept_on_resume()
    changed = [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]
    return sorted(changed + [f"data.{name}" for name in _JUDGED if _fractions(old, name) != _fractions(new, name)])


def _fractions(recipe: Recipe, section: str) -> list[tuple[Any, Any]]:
    """What is taken out of the training data, which may not change."""
    entries = recipe.data.sections()[section]
    return [(entry.name, entry.fraction) for entry in entries if entry.fraction is not None]


def _unfinished_of(recipe: Recipe, folder: Path) -> bool:
    if (folder / SUMMARY).exists() and not recipe.run.evaluate:
        return False
    try:
        differences = recipe_differences(recipe, folder / "config.yaml")
    except ConfigError as error:  # a run with names that only its own imports know
        log.info("not resuming %s: %s", folder, error)
        return False
    if differences:
        log.info("not resuming %s: it was made with other values of %s", folder, ", ".join(differences))
    return not differences


def _new_folder(output_dir: Path) -> Path:
    name = time.strftime("%Y%m%d_%H%M%S")
    for suffix in ("", *(f"_{i}" for i in range(1, 1000))):
        folder = output_dir / f"{name}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # two runs started in the same second
            continue
        except OSError as error:
            raise CheckpointError(
                f"no run folder can be made in {output_dir} ({error}): fix run.output_dir."
            ) from error
        return folder
    raise CheckpointError(f"no free name for a new run under {output_dir}.")


def frozen_differences(saved: dict[str, str], now: dict[str, str]) -> list[str]:
    """Frozen weight files (by recipe key) whose contents are not those the checkpoint was trained with."""
    return sorted(k for k, identity in saved.items() if now.get(FROZEN.get(k, k), now.get(k)) != identity)
