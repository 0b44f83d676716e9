"""The data of a run: prepared tables of its sections, the step plan, the loader, and where images come from."""

from __future__ import annotations

import logging
import shutil
from typing import Any, cast

import numpy as np
from torch import nn

from lavis.config.recipe import Recipe
from lavis.core.dist import World
from lavis.core.errors import ConfigError, TrainingError
from lavis.core.paths import cache_root, resolve
from lavis.core.registries import OBJECTIVES
from lavis.data.assemble import Portion, media_processor, portions
from lavis.data.feature_cache import cache_features
from lavis.data.loader import ImageFolder, ImageSource, NoImages, TrainLoader
from lavis.data.sampler import StepPlan
from lavis.data.table import PreparedTable
from lavis.data.texts import Texts

log = logging.getLogger(__name__)
_IMAGES_BEFORE_STOPPING = 100
"""The share of bad images is judged once this many were read."""
_NOT_LEARNED = ("pair", "prompt")
"""Kinds of rows that no objective reads yet."""


def accumulation(recipe: Recipe, world_size: int) -> int:
    """Micro-batches per rank and optimiser step. Raises ConfigError when train.global_batch_size does not divide."""
    train = recipe.train
    if train.global_batch_size is None:
        return train.accumulation
    accum, rest = divmod(train.global_batch_size, train.micro_batch_size * world_size)
    if rest or not accum:
        raise ConfigError(
            f"train.global_batch_size is {train.global_batch_size}, which is no multiple of micro_batch_size x ranks "
            f"({train.micro_batch_size} x {world_size}): change one of them."
        )
    return accum


class RunData:
    """Tables of all sections a run uses; `loader` yields the training steps.

    valid, test: name of the results to the tables they are about. Without images, batches have ids and labels alone.
    """

    def __init__(self, recipe: Recipe, texts: Texts, world: World, *, with_images: bool = True) -> None:
        self.recipe, self.texts, self.world = recipe, texts, world
        self._portions = [p for p in portions(recipe) if p.section != "train" or not recipe.run.evaluate]
        _check_kinds(self._portions, recipe.objective.name)
        tables = [(p, p.prepare(recipe.model, texts.tokenizer)) for p in self._portions]
        self.valid, self.test = _by_split(tables, "valid"), _by_split(tables, "test")
        self._tables = [table for _, table in tables]
        self.train_images, self.eval_images = (self._images_for(with_images, training) for training in (True, False))
        self._seen, self._bad = 0.0, 0.0
        if not recipe.run.evaluate:
            self.train_tables = [table for portion, table in tables if portion.section == "train"]
            self.plan = self._step_plan()
            self._open_loader()

    def _images_for(self, with_images: bool, training: bool) -> ImageSource:
        model = self.recipe.model
        return ImageFolder(media_processor(model, training=training)) if with_images and model.sees else NoImages()

    @property
    def num_train_samples(self) -> int:
        """Samples of all training tables."""
        return sum(len(t) for t in self.train_tables)

    def _step_plan(self) -> StepPlan:
        recipe, data = self.recipe, self.recipe.data
        return StepPlan(
            np.concatenate([t.lengths for t in self.train_tables]),
            batch_size=recipe.train.micro_batch_size,
            accum=accumulation(recipe, self.world.size),
            world_size=self.world.size,
            seed=recipe.run.seed,
            length_grouping=data.length_grouping,
            pack_length=data.pack_length if data.packing else None,
            dataset_sizes=[len(t) for t in self.train_tables],
            ratios=self._ratios(),
            tokens=budget if isinstance(budget := recipe.train.micro_batch_tokens, int) else None,
        )

    def _ratios(self) -> list[float] | None:
        weights = [p.source.entry.weight for p in self._portions if p.section == "train"]
        return None if None in weights else cast("list[float]", weights)

    def _open_loader(self) -> None:
        self.loader = TrainLoader(
            self.train_tables,
            self.plan,
            self.train_images,
            self.texts.template.pad_token_id,
            rank=self.world.rank,
            num_workers=self.recipe.data.num_workers,
            seed=self.recipe.run.seed,
            pin=self.world.device.type == "cuda",
        )

    def caches_features(self, steps: int) -> bool:
        """Whether images are to be encoded once, in a run of so many steps: as the recipe says, else where it saves
        work and there is room. The same on all ranks, which call it together.
        """
        wanted = self.recipe.data.cache_features
        if wanted != "auto":
            return bool(wanted)
        model: Any = self.recipe.model
        deterministic = isinstance(self.train_images, ImageFolder) and self.train_images.processor.deterministic
        if not (steps and deterministic and model.row_format == "chat") or any(model.changing()):
            return False
        images = sum(len(table.image_paths()) for table in self._tables)
        shown = sum(table.num_images for table in self.train_tables) / max(1, self.num_train_samples)
        vectors, width = model.connector.encoded(model.tower.span(), model.tower.width())
        size = 4 * vectors * width * sum(int(table.num_tiles.sum()) for table in self._tables)
        room = min(self.recipe.data.cache_features_gib * 2**30, shutil.disk_usage(cache_root()).free / 2)
        refused = not images or 2 * images > shown * steps * self.plan.global_batch or size > room
        return not any(self.world.max(refused))

    def cache_features(self, model: nn.Module, more: list[str]) -> None:
        """Replace image files by cached vectors of `model`'s frozen encoder, for training and evaluation.

        `more`: images beside those of the tables.
        """
        paths = [p for t in self._tables for p in t.image_paths()] + [str(resolve(p)) for p in more]
        processor = media_processor(self.recipe.model)
        encoder: Any = model
        cached = cache_features(encoder, paths, ImageFolder(processor), repr(processor), self.world)
        self.train_images = self.eval_images = cached
        self.count_images(0, len(paths), cached.bad)
        if not self.recipe.run.evaluate:
            self._open_loader()

    def count_images(self, step: int, images: float, bad: float) -> None:
        """Stop when too many images could not be read. Raises TrainingError naming the share."""
        self._seen += images
        self._bad += bad
        limit = self.recipe.data.max_bad_image_share
        if self._seen >= _IMAGES_BEFORE_STOPPING and self._bad > limit * self._seen:
            raise TrainingError(
                f"step {step}: {self._bad:.0f} of {self._seen:.0f} images could not be read, more than"
                f" data.max_bad_image_share={limit}. `lavis data check` lists them."
            )


def _by_split(tables: list[tuple[Portion, PreparedTable]], section: str) -> dict[str, list[PreparedTable]]:
    """Name of the results to the tables of a section."""
    found: dict[str, list[PreparedTable]] = {}
    for portion, table in tables:
        if portion.section == section:
            found.setdefault(portion.split, []).append(table)
    return found


def _check_kinds(found: list[Portion], objective: str) -> None:
    """Raise ConfigError for rows that can be prepared, but not learned yet, or not by `objective`."""
    read = OBJECTIVES.get(objective).kinds
    for portion in found:
        kind = portion.source.entry.kind
        if kind in _NOT_LEARNED:
            raise ConfigError(
                f"{portion.source.key}.kind is {kind}: rows of this kind are prepared, checked and shown, but no"
                " objective learns from them yet. Give conversations, captions or documents."
            )
        if kind not in read and portion.section != "test":
            raise ConfigError(
                f"{portion.source.key}.kind is {kind}, but objective.name {objective} reads"
                f" {' or '.join(sorted(read))}: give such rows, or choose another objective."
            )
