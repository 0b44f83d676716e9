"""The data of a run: prepared tables of its splits, the step plan, the loader, and where images come from."""

from __future__ import annotations

import logging

import numpy as np
from torch import nn

from lavis.config.recipe import Recipe
from lavis.config.schema import ProcessorPair, RunConfig
from lavis.core.dist import World
from lavis.core.errors import ConfigError, TrainingError
from lavis.core.paths import resolve
from lavis.data.assemble import make_builders, prepare_split
from lavis.data.feature_cache import cache_features
from lavis.data.image import image_processor
from lavis.data.loader import ImageFolder, ImageSource, NoImages, TrainLoader
from lavis.data.prepare import PreparedTable
from lavis.data.sampler import StepPlan
from lavis.data.texts import Texts

log = logging.getLogger(__name__)
_IMAGES_BEFORE_STOPPING = 100
"""The share of bad images is judged once this many were read."""


def image_processors(recipe: Recipe) -> ProcessorPair:
    """The image processors of the recipe's datasets with images. Raises ConfigError if they differ."""
    pairs = {n: d.vis_processor for n, d in recipe.datasets.items() if d.data_type != "text"}
    name, pair = next(iter(pairs.items()), ("", ProcessorPair()))
    for other, theirs in pairs.items():
        if theirs != pair:
            raise ConfigError(
                f"datasets.{other}.vis_processor differs from that of {name}: images of one run are processed alike."
            )
    return pair


def accumulation(run: RunConfig, world_size: int) -> int:
    """Micro-batches per rank and optimiser step. Raises ConfigError when run.global_batch_size can't be cut evenly."""
    if run.global_batch_size is None:
        return run.accum_grad_iters
    accum, rest = divmod(run.global_batch_size, run.batch_size_train * world_size)
    if rest or not accum:
        raise ConfigError(
            f"run.global_batch_size is {run.global_batch_size}, which is no multiple of batch_size_train x ranks "
            f"({run.batch_size_train} x {world_size}): change one of them."
        )
    return accum


class RunData:
    """Tables of all splits a run uses; `loader` yields the training steps.

    Without images, batches have ids and labels alone.
    """

    def __init__(self, recipe: Recipe, texts: Texts, world: World, *, with_images: bool = True) -> None:
        self.recipe, self.texts, self.world = recipe, texts, world
        run = recipe.run
        self.splits: dict[str, list[PreparedTable]] = {
            split: prepare_split(recipe, split, texts.tokenizer)
            for split in dict.fromkeys(
                [*([] if run.evaluate else run.train_splits), *run.valid_splits, *run.test_splits]
            )
        }
        self.processors = image_processors(recipe)
        self.train_images: ImageSource = (
            ImageFolder(image_processor(self.processors.train)) if with_images else NoImages()
        )
        self.eval_images: ImageSource = (
            ImageFolder(image_processor(self.processors.eval)) if with_images else NoImages()
        )
        self._images, self._bad = 0.0, 0.0
        if not run.evaluate:
            self.train_tables = [t for split in run.train_splits for t in self.splits[split]]
            self.plan = self._step_plan()
            self._open_loader()

    @property
    def num_train_samples(self) -> int:
        """Samples of all training tables."""
        return sum(len(t) for t in self.train_tables)

    def _step_plan(self) -> StepPlan:
        run = self.recipe.run
        return StepPlan(
            np.concatenate([t.lengths for t in self.train_tables]),
            batch_size=run.batch_size_train,
            accum=accumulation(run, self.world.size),
            world_size=self.world.size,
            seed=run.seed,
            length_grouping=run.length_grouping,
            pack_length=run.pack_length if run.packing else None,
            dataset_sizes=[len(t) for t in self.train_tables],
            ratios=self._ratios(),
        )

    def _ratios(self) -> list[float] | None:
        ratios = self.recipe.run.train_dataset_ratios
        if not ratios:
            return None
        builders = make_builders(self.recipe)
        return [
            ratios.get(b.name, 0.0) for split in self.recipe.run.train_splits for b in builders if split in b.splits
        ]

    def _open_loader(self) -> None:
        run = self.recipe.run
        self.loader = TrainLoader(
            self.train_tables,
            self.plan,
            self.train_images,
            self.texts.template.pad_token_id,
            rank=self.world.rank,
            num_workers=run.num_workers,
            seed=run.seed,
        )

    def cache_features(self, model: nn.Module, more: list[str]) -> None:
        """Replace image files by cached query vectors of `model`'s frozen tower, for training and evaluation.

        `more`: images beside those of the splits.
        """
        paths = [p for tables in self.splits.values() for t in tables for p in t.image_paths()] + [
            str(resolve(p)) for p in more
        ]
        cached = cache_features(model, paths, self.eval_images, repr(self.processors.eval), self.world)
        self.train_images = self.eval_images = cached
        self.count_images(0, len(paths), cached.bad)
        if not self.recipe.run.evaluate:
            self._open_loader()

    def count_images(self, step: int, images: float, bad: float) -> None:
        """Stop when too many images could not be read. Raises TrainingError naming the share."""
        self._images += images
        self._bad += bad
        limit = self.recipe.run.max_bad_image_share
        if self._images >= _IMAGES_BEFORE_STOPPING and self._bad > limit * self._images:
            raise TrainingError(
                f"step {step}: {self._bad:.0f} of {self._images:.0f} images could not be read, more than"
                f" run.max_bad_image_share={limit}. `lavis data check` lists them."
            )
