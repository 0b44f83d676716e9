"""What a run needs on the hardware it is on, for its own longest rows, and what is decided from that."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lavis.config.recipe import Recipe
from lavis.data.assemble import prepare_split
from lavis.data.prepare import PreparedTable
from lavis.data.texts import Texts
from lavis.parallel.plan import Machine, Planner
from lavis.parallel.strategy import Ranks, Strategy
from lavis.train.data import accumulation

log = logging.getLogger(__name__)
BUDGETS = (8192, 4096, 2048, 1024)
"""Tokens of a micro-batch that are tried. More make a GPU no faster, and fewer are what a recipe has anyway."""


def run_planner(recipe: Recipe, tables: Sequence[PreparedTable], ranks: Ranks) -> Planner:
    """Plans of a run on this rank's hardware, for the longest row of its training `tables`."""
    data = recipe.data
    lengths, supervised, images = (
        np.concatenate([getattr(t, name) for t in tables]) for name in ("lengths", "supervised_tokens", "num_tiles")
    )
    if data.packing:
        filled = data.pack_length / lengths.sum()
        row = {
            "tokens": data.pack_length,
            "images": math.ceil(filled * images.sum()),
            "supervised": math.ceil(filled * supervised.sum()),
        }
    else:
        row = {"tokens": int(lengths.max()), "images": int(images.max()), "supervised": int(supervised.max())}
    samples = recipe.train.micro_batch_size * accumulation(recipe, ranks.data.size) * ranks.data.size
    return Planner(recipe, Machine.this(ranks.world.device), samples=samples, **row)


def settle_micro_batches(recipe: Recipe, texts: Texts, strategy: type[Strategy], ranks: Ranks) -> Recipe:
    """`recipe` with train.micro_batch_tokens=auto decided: the largest of BUDGETS that a GPU has room for without more
    recomputation than the recipe wants, else none.
    """
    model: Any = recipe.model
    world = ranks.world
    if recipe.train.micro_batch_tokens != "auto":
        return recipe
    budget = None
    single = recipe.parallel.strategy == "data_parallel" and model.row_format == "chat"
    if single and world.device.type == "cuda" and not recipe.run.evaluate:
        with world.local_main_first():
            tables = prepare_split(recipe, "train", texts.tokenizer)
        budget = world.broadcast(_largest(recipe, tables, strategy, ranks) if world.is_main else None)
    return replace(recipe, train=replace(recipe.train, micro_batch_tokens=budget))


def _largest(recipe: Recipe, tables: Sequence[PreparedTable], strategy: type[Strategy], ranks: Ranks) -> int | None:
    model: Any = recipe.model
    planner = run_planner(recipe, tables, ranks)
    layout = strategy.layout(recipe, ranks.world)
    for budget in BUDGETS:
        rows = budget // planner.tokens
        if rows > 1 and planner.plan(layout, rows=rows, recompute=model.recomputes is True).fits(planner.machine):
            return budget
    return None


def settle_recomputation(recipe: Recipe, texts: Texts, strategy: type[Strategy], ranks: Ranks) -> Recipe:
    """`recipe` with model.llm.recompute=auto decided: recomputing, where a GPU has no room without.

    Before anything is built of it, so that nothing has the undecided one.
    """
    model: Any = recipe.model
    world = ranks.world
    if model.recomputes != "auto":
        return recipe
    needed = False
    if world.device.type == "cuda" and not recipe.run.evaluate:
        with world.local_main_first():
            tables = prepare_split(recipe, "train", texts.tokenizer)
        needed = world.broadcast(_needs_it(recipe, tables, strategy, ranks) if world.is_main else None)
    return replace(recipe, model=model.with_recomputation(needed))


def _needs_it(recipe: Recipe, tables: Sequence[PreparedTable], strategy: type[Strategy], ranks: Ranks) -> bool:
    planner = run_planner(recipe, tables, ranks)
    layout = strategy.layout(recipe, ranks.world)
    plan = planner.plan(layout, blocks=recipe.parallel.stage_blocks or None, recompute=False)
    if plan.fits(planner.machine):
        return False
    log.info(
        "a rank would need %.1f of %.1f GiB: activations of the LLM are recomputed (model.llm.recompute=auto)",
        plan.peak / 2**30,
        planner.machine.memory / 2**30,
    )
    return True
