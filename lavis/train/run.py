"""A run: everything a recipe names is built, then trained or evaluated, and what came out is written down."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lavis.config.recipe import Recipe
from lavis.core.dist import World, world
from lavis.core.errors import CheckpointError
from lavis.core.logging import setup_logging
from lavis.core.paths import cache_root
from lavis.core.registries import OBJECTIVES, STRATEGIES
from lavis.data.texts import Texts
from lavis.models.llm import DTYPES
from lavis.objectives.learner import Learner
from lavis.parallel.flops import Arithmetic
from lavis.parallel.strategy import Ranks, Strategy, load_trained, parameter_counts, tensor_names
from lavis.runs.checkpoint import (
    Checkpoint,
    TrainState,
    best_checkpoint,
    complete_checkpoints,
    drop_later,
    frozen_files,
    identity,
)
from lavis.runs.folder import SUMMARY, RunFolder, frozen_differences, open_run_folder
from lavis.runs.metrics import MetricsLog
from lavis.runs.report import plot_loss
from lavis.train.callbacks import Checkpoints, SamplePrompts, StepLog, Tests, Validation
from lavis.train.data import RunData
from lavis.train.evaluator import Evaluator
from lavis.train.loop import train_loop
from lavis.train.planning import run_planner, settle_micro_batches, settle_recomputation
from lavis.train.schedules import Horizon, horizon
from lavis.train.tokenizer import train_tokenizer

log = logging.getLogger(__name__)


def run_recipe(recipe: Recipe) -> dict[str, Any]:
    """Do what `recipe` says on this rank; returns the summary that is also written to summary.json.

    Raises LavisError for what a user can fix.
    """
    if recipe.objective.name == "tokenizer_training":
        return train_tokenizer(recipe)
    strategy: type[Strategy] = STRATEGIES.get(recipe.parallel.strategy)
    strategy.require(recipe)
    with world(recipe.run.device, always=strategy.grouped) as w:
        job = prepare(recipe, strategy, w)
        return evaluate(job) if recipe.run.evaluate else train(job)


@dataclass(frozen=True)
class Job:
    """A run whose model is on its device and whose data is prepared. Only training has a `span`.

    counts: trainable and all parameters. frozen: identity of each frozen weight file.
    """

    recipe: Recipe
    strategy: type[Strategy]
    ranks: Ranks
    folder: Path
    checkpoint: Checkpoint | None
    texts: Texts
    data: RunData
    learner: Learner
    span: Horizon | None
    counts: tuple[int, int]
    frozen: dict[str, str]

    @property
    def world(self) -> World:
        """All ranks."""
        return self.ranks.world

    def evaluator(self, learner: Learner) -> Evaluator:
        """What measures `learner`."""
        return Evaluator(self.recipe, self.texts, self.data, learner, self.folder)


def prepare(recipe: Recipe, strategy: type[Strategy], w: World) -> Job:
    """Open the run's folder and build what it needs."""
    ranks = strategy.split(recipe, w)
    opened = _open_folder(recipe, w)
    started = time.perf_counter()
    torch.manual_seed(recipe.run.seed)
    texts, objective = Texts.of(recipe), OBJECTIVES.get(recipe.objective.name).from_config(recipe.objective)
    recipe = settle_micro_batches(recipe, texts, strategy, ranks)
    recipe = settle_recomputation(recipe, texts, strategy, ranks)
    with w.local_main_first():  # tables are made once and left on disk
        data = RunData(recipe, texts, ranks.data, with_images=ranks.sees)
    span = None if recipe.run.evaluate else horizon(recipe.optim, recipe.train, data.plan.steps_per_epoch)
    learner = strategy.build(
        recipe, texts.tokenizer, objective, ranks, lambda: run_planner(recipe, data.train_tables, ranks)
    )
    learner.train()
    counts = parameter_counts(learner, ranks)
    if ranks.sees and data.caches_features(span.total_steps if span else 0):
        data.cache_features(learner.image_encoder(), [p.image for p in recipe.eval.prompts if p.image])
    frozen = {key: identity(path) for key, path in frozen_files(recipe.model).items()}
    log.info("run folder %s; ready after %.1f s", opened.path, time.perf_counter() - started)
    return Job(recipe, strategy, ranks, opened.path, opened.checkpoint, texts, data, learner, span, counts, frozen)


def _open_folder(recipe: Recipe, w: World) -> RunFolder:
    opened: RunFolder = w.broadcast(open_run_folder(recipe) if w.is_main else None)
    if w.is_main:
        setup_logging(file=opened.path / "log.txt")
        recipe.save(opened.path)
    return opened


# ---- evaluation alone


def evaluate(job: Job) -> dict[str, Any]:
    """Judge the model as it is, or as the run's checkpoint has it."""
    if job.checkpoint:
        checked_state(job.checkpoint, job.frozen)
        _load(job, job.checkpoint)
    evaluator, recipe = job.evaluator(job.learner), job.recipe
    results = evaluator.test("test")
    if job.data.valid:
        results |= {f"valid/{name}": value for name, value in evaluator.validate().items()}
    if recipe.eval.blind:
        results |= evaluator.test("blind", blind=True)
    return finish(job, {"results": results})


# ---- training


def train(job: Job) -> dict[str, Any]:
    """Train to the end of the run, from its checkpoint if there is one."""
    span, recipe = job.span, job.recipe
    assert span
    if job.checkpoint:
        _load(job, job.checkpoint)
    describe(job, span)
    arithmetic = Arithmetic.of(job.learner.model, job.ranks)
    strategy = job.strategy(job.learner, job.recipe, job.ranks, job.data.plan.accum)
    done, best = resume(job, strategy, job.checkpoint) if job.checkpoint else (0, None)
    metrics = MetricsLog(job.folder, recipe.log.trackers, done, span.total_steps) if job.world.is_main else None

    def write(kind: str, step: int, values: Mapping[str, Any]) -> None:
        if metrics and values:
            metrics.write(kind, step, values)

    evaluator = job.evaluator(strategy.learner)
    validation = Validation(recipe, span.steps_per_epoch, evaluator, write)
    tests = Tests(recipe, evaluator, write, span.total_steps)
    callbacks = (
        StepLog(recipe, job.data, job.world, arithmetic, metrics),
        validation,
        SamplePrompts(evaluator, validation, span.total_steps),
        Checkpoints(job.recipe, job.folder / "checkpoints", strategy, job.data, validation, job.frozen, best),
        tests,
    )
    try:
        seconds = train_loop(strategy, job.data.loader, span, done, callbacks)
        summary = {"results": tests.results, "steps": span.total_steps, "train_seconds": round(seconds, 2)}
        return finish(job, summary)
    finally:
        if metrics:
            metrics.close()


def resume(job: Job, strategy: Strategy, checkpoint: Checkpoint) -> tuple[int, float | None]:
    """(steps done, best validation loss) of a checkpoint, whose optimiser state `strategy` takes over."""
    state = checked_state(checkpoint, job.frozen)
    now, folder = job.data.plan.global_batch, job.folder / "checkpoints"
    if state.global_batch != now:
        raise CheckpointError(
            f"{checkpoint.path} was trained with {state.global_batch} rows per step, now it would be {now}"
            " (micro_batch_size x accumulation x ranks): keep the product to go on exactly, or set"
            " train.global_batch_size."
        )
    if job.world.is_main:
        drop_later(folder, state.step)
    job.world.barrier()
    strategy.load_state_tensors(checkpoint.optimizer_tensors())
    if state.loss_scale:
        strategy.scaler.load_state_dict(state.loss_scale)
    best = best_checkpoint(complete_checkpoints(folder))
    log.info("resumed from %s at step %d", checkpoint.path, state.step)
    return state.step, best.valid_loss if best else None


def checked_state(checkpoint: Checkpoint, frozen: dict[str, str]) -> TrainState:
    """The counters of a checkpoint. Raises CheckpointError if it was trained with other frozen weights."""
    state = checkpoint.state()
    if changed := frozen_differences(state.frozen, frozen):
        raise CheckpointError(
            f"{checkpoint.path} was trained with other frozen weights than those there now:"
            f" model.{', model.'.join(changed)}."
        )
    return state


def _load(job: Job, checkpoint: Checkpoint) -> None:
    all_of_it = not job.recipe.run.evaluate
    load_trained(job.learner, checkpoint.tensors(), job.world, where=str(job.folder), all_of_it=all_of_it)


def describe(job: Job, span: Horizon) -> None:
    """Log what is trained, on how much."""
    count, total = job.counts
    names = tensor_names(job.learner, job.world, trained=True)
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    log.info("training %s of %s parameters: %s", f"{count:,}", f"{total:,}", shown)
    log.info(
        "%d samples, %d steps per epoch, %d steps in all, %d rows per step on %d rank(s) on %s",
        job.data.num_train_samples, span.steps_per_epoch, span.total_steps, job.data.plan.global_batch,
        job.world.size, job.world.device,
    )  # fmt: skip


def finish(job: Job, summary: dict[str, Any]) -> dict[str, Any]:
    """Write what is left at the end: loss plot, exported parts, summary."""
    count, total = job.counts
    summary |= {"trainable_parameters": count, "total_parameters": total, "run_folder": str(job.folder)}
    written = [job.folder / name for name in ("config.yaml", "metrics.jsonl", "report.html")]
    if job.world.is_main and not job.recipe.run.evaluate:
        checkpoints = complete_checkpoints(job.folder / "checkpoints")
        best = best_checkpoint(checkpoints)
        summary["last"], summary["best"] = str(checkpoints[-1].path), str(best.path) if best else None
        written += [p for p in (plot_loss(job.folder), checkpoints[-1].path) if p]
        written += _export(job)
    summary["written"] = [str(p) for p in written if p.exists()]
    if job.world.is_main:
        (job.folder / SUMMARY).write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
        for name, value in summary["results"].items():
            log.info("%s: %.4f", name, value)
        log.info("written:\n  %s", "\n  ".join(summary["written"]))
    job.world.barrier()
    return summary


def _export(job: Job) -> list[Path]:
    """What later recipes load, written to `export.path`."""
    recipe = job.recipe
    if not recipe.export.path:
        return []
    folder = Path(recipe.export.path)
    folder = folder if folder.is_absolute() else cache_root() / folder
    return job.learner.model.export(folder, DTYPES[recipe.export.dtype], job.texts.tokenizer)
