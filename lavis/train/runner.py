"""The training loop: one for every task and every strategy."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from lavis.config.recipe import Recipe
from lavis.core.dist import World, world
from lavis.core.errors import CheckpointError
from lavis.core.logging import setup_logging
from lavis.core.paths import cache_root
from lavis.core.registries import RUNNERS, TASKS
from lavis.core.types import Batch
from lavis.models.llm import DTYPES
from lavis.objectives.base import Task
from lavis.parallel.plan import Layout, Machine, Planner
from lavis.parallel.strategy import DataParallelStrategy, StepResult, Strategy
from lavis.runs.checkpoint import (
    TrainState,
    best_checkpoint,
    complete_checkpoints,
    drop_later,
    identity,
    prune,
    save_checkpoint,
)
from lavis.runs.folder import SUMMARY, RunFolder, frozen_differences, open_run_folder
from lavis.runs.metrics import MetricsLog, peak_memory_bytes
from lavis.runs.report import plot_loss
from lavis.train.data import RunData
from lavis.train.evaluator import Evaluator
from lavis.train.optim import trainable_parameters
from lavis.train.schedules import horizon, learning_rate

log = logging.getLogger(__name__)


@RUNNERS.register("runner_base")
class RunnerBase:
    """Trains or evaluates what a recipe says, in one process or data-parallel under torchrun.

    Other runners are this one with another strategy: they say how a model is spread over ranks, never how a run goes
    on.
    """

    always_grouped: ClassVar[bool] = False
    """Whether a process group is needed also for a single rank."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.run_config = recipe.run

    def run(self) -> dict[str, Any]:
        """Do it all; returns the summary that is also written to summary.json.

        Raises LavisError for what a user can mend.
        """
        with world(self.run_config.device, always=self.always_grouped) as w:
            self.world: World = w
            self.data_world = self._split_world()
            opened: RunFolder = w.broadcast(open_run_folder(self.recipe) if w.is_main else None)
            self.folder, self.checkpoint = opened.path, opened.checkpoint
            if w.is_main:
                setup_logging(file=self.folder / "log.txt")
                (self.folder / "config.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")
            self._build()
            try:
                summary = self._evaluate_only() if self.run_config.evaluate else self._train()
            finally:
                if self.metrics:
                    self.metrics.close()
            return summary

    def _build(self) -> None:
        started = time.perf_counter()
        torch.manual_seed(self.run_config.seed)
        self.task: Task = TASKS.get(self.run_config.task)(self.recipe)
        with self.world.local_main_first():  # tables are made once and left on disk
            self.data = RunData(self.recipe, self.task, self.data_world, with_images=self._sees())
        self._settle_recomputation()
        if not self.run_config.evaluate:
            self.span = horizon(self.run_config, self.data.plan.steps_per_epoch)
        self.model: nn.Module = self._build_model()
        self.model.train()
        self.counts = self._count_parameters()
        if self.recipe.data.cache_features:
            self._cache_features(self.model)
        self.frozen = {key: identity(path) for key, path in self.task.frozen_files().items()}
        self.evaluator = Evaluator(self.recipe, self.task, self.data, self.model, self.data_world, self.folder)
        self.metrics: MetricsLog | None = None
        log.info("run folder %s; ready after %.1f s", self.folder, time.perf_counter() - started)

    def _split_world(self) -> World:
        """The ranks over which data is split: all of them, unless several work on the same samples."""
        return self.world

    def _sees(self) -> bool:
        """Whether this rank needs images."""
        return True

    def _layout(self) -> Layout:
        """How the run lies on the ranks, for its plan."""
        return Layout(self.world.size)

    def _planner(self) -> Planner:
        """Plans of this run on this rank's hardware, for its longest row."""
        lengths, supervised, images = (
            np.concatenate([getattr(t, name) for t in self.data.train_tables])
            for name in ("lengths", "supervised_tokens", "num_tiles")
        )
        if self.recipe.data.packing:
            tokens = self.recipe.data.pack_length
            filled = tokens / lengths.sum()
            row = {
                "tokens": tokens,
                "images": math.ceil(filled * images.sum()),
                "supervised": math.ceil(filled * supervised.sum()),
            }
        else:
            row = {"tokens": int(lengths.max()), "images": int(images.max()), "supervised": int(supervised.max())}
        return Planner(self.recipe, Machine.this(self.world.device), samples=self.data.plan.global_batch, **row)

    def _settle_recomputation(self) -> None:
        """Decide what model.llm_grad_checkpoint=auto is: recomputing, where a GPU has no room without."""
        model = self.recipe.model
        if getattr(model, "llm_grad_checkpoint", None) != "auto":
            return
        needed = False
        if self.world.device.type == "cuda" and not self.run_config.evaluate:
            needed = self.world.broadcast(self._needs_recomputation() if self.world.is_main else None)
        self.recipe = replace(self.recipe, model=replace(model, llm_grad_checkpoint=needed))
        self.task.recipe = self.recipe

    def _needs_recomputation(self) -> bool:
        planner = self._planner()
        plan = planner.plan(self._layout(), blocks=self.run_config.stage_blocks or None, recompute=False)
        if plan.fits(planner.machine):
            return False
        room = planner.machine.memory / 2**30
        log.info(
            "a rank would need %.1f of %.1f GiB: activations of the LLM are recomputed"
            " (model.llm_grad_checkpoint=auto)",
            plan.peak / 2**30,
            room,
        )
        return True

    def _cache_features(self, model: nn.Module) -> None:
        self.data.cache_features(model, [p.image for p in self.run_config.sample_prompts if p.image])

    def _build_model(self) -> nn.Module:
        return self.task.build_model(self.world.device)

    def _build_strategy(self) -> Strategy:
        return DataParallelStrategy(self.model, self.task, self.run_config, self.world)

    # -- evaluation alone

    def _evaluate_only(self) -> dict[str, Any]:
        if self.checkpoint:
            self._checked_state()
            self._load_trained(self.checkpoint.tensors())
        results = self.evaluator.test("test")
        if self.data.valid:
            results |= {f"valid/{name}": value for name, value in self.evaluator.validate().items()}
        if self.run_config.evaluate_blind:
            results |= self.evaluator.test("blind", blind=True)
        return self._finish({"results": results})

    # -- training

    def _train(self) -> dict[str, Any]:
        if self.checkpoint:
            self._load_trained(self.checkpoint.tensors())
        self._describe()
        self.strategy = self._build_strategy()
        self.evaluator.follow(self.strategy)
        results: dict[str, float] = {}
        self.best_loss: float | None = None
        step = self._resume() if self.checkpoint else 0
        if self.world.is_main:
            self.metrics = MetricsLog(self.folder, self.run_config.trackers, step, self.span.total_steps)
        if step == 0:
            if self.run_config.evaluate_before:
                results |= self.evaluator.test("before")
                self._write_metrics("test", 0, results)
            self.evaluator.sample_prompts(0)
        started = time.perf_counter()
        self._loop(step)
        train_seconds = time.perf_counter() - started
        self.evaluator.sample_prompts(self.span.total_steps)
        results |= self.evaluator.test("test")
        if self.run_config.evaluate_blind:
            results |= self.evaluator.test("blind", blind=True)
        self._write_metrics("test", self.span.total_steps, results)
        return self._finish(
            {"results": results, "steps": self.span.total_steps, "train_seconds": round(train_seconds, 2)}
        )

    def _loop(self, step: int) -> None:
        per_epoch, total = self.span.steps_per_epoch, self.span.total_steps
        while step < total:
            epoch, start = divmod(step, per_epoch)
            waited = time.perf_counter()
            for batches in self.data.loader.steps(epoch, start):
                data_seconds = time.perf_counter() - waited
                torch.manual_seed(_step_seed(self.run_config.seed, step, self.world.rank))
                began = time.perf_counter()
                rate = learning_rate(self.run_config, self.span, step)
                result = self.strategy.step(batches, rate, step + 1)
                step += 1
                self._log_step(step, rate, result, batches, data_seconds, time.perf_counter() - began)
                self._at_step_end(step)
                if step == total:
                    break
                waited = time.perf_counter()

    def _at_step_end(self, step: int) -> None:
        run, last = self.run_config, step == self.span.total_steps
        per_epoch = self.span.steps_per_epoch
        valid_loss = None
        if self.data.valid and (last or step % (run.eval_freq or per_epoch) == 0):
            values = self.evaluator.validate()
            valid_loss = values["loss"]
            self._write_metrics("valid", step, values)
            log.info("step %d  validation loss %.4f", step, valid_loss)
            if not last:
                self.evaluator.sample_prompts(step)
        if last or step % (run.save_freq or per_epoch) == 0 or _is_better(valid_loss, self.best_loss):
            self._save(step, valid_loss)
        if _is_better(valid_loss, self.best_loss):
            self.best_loss = valid_loss

    def _log_step(
        self, step: int, rate: float, result: StepResult, batches: list[Batch], data_seconds: float, seconds: float
    ) -> None:
        samples, supervised, positions, pad, images, bad = self.data_world.sum(
            sum(b.num_samples for b in batches),
            sum(b.supervised_tokens for b in batches),
            sum(b.input_ids.numel() for b in batches),
            sum(b.num_pad for b in batches),
            sum(_images_in(b) for b in batches),
            sum(b.bad_images for b in batches),
        )
        self.data.count_images(step, images, bad)
        if not self.metrics or (step % self.run_config.log_freq and step != self.span.total_steps):
            return
        wall = data_seconds + seconds
        values = {
            "epoch": (step - 1) // self.span.steps_per_epoch,
            "loss": result.loss,
            **result.parts,
            "lr": rate,
            "grad_norm": result.grad_norm,
            "samples_per_s": samples / wall,
            "tokens_per_s": (positions - pad) / wall,
            "supervised_tokens_per_s": supervised / wall,
            "padding": pad / positions,
            "step_seconds": wall,
            "data_seconds": data_seconds,
            "comm_seconds": result.comm_seconds,
            "compute_seconds": seconds - result.comm_seconds,
            "peak_memory_gib": peak_memory_bytes(self.world.device) / 2**30,
        }
        self.metrics.train_line(step, values)

    def _write_metrics(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self.metrics and values:
            self.metrics.write(kind, step, values)

    # -- checkpoints

    def _save(self, step: int, valid_loss: float | None) -> None:
        # by all ranks together
        tensors, optimizer_tensors = self.strategy.trained_tensors(), self.strategy.state_tensors()
        if self.world.is_main:
            folder = self.folder / "checkpoints"
            state = TrainState(
                step, self.data.plan.global_batch, self.strategy.scaler.state_dict(), self.frozen, valid_loss
            )
            save_checkpoint(folder, state, tensors, optimizer_tensors, self.recipe.to_yaml())
            prune(folder, self.run_config.keep_checkpoints)
        self.world.barrier()

    def _resume(self) -> int:
        state = self._checked_state()
        if state.global_batch != self.data.plan.global_batch:
            raise CheckpointError(
                f"{self.checkpoint.path} was trained with {state.global_batch} rows per step, now it would be"
                f" {self.data.plan.global_batch} (batch_size_train x accum_grad_iters x ranks): keep the product to go"
                " on exactly, or set run.global_batch_size."
            )
        if self.world.is_main:
            drop_later(self.folder / "checkpoints", state.step)
        self.world.barrier()
        self.strategy.load_state_tensors(self.checkpoint.optimizer_tensors())
        if state.loss_scale:
            self.strategy.scaler.load_state_dict(state.loss_scale)
        best = best_checkpoint(complete_checkpoints(self.folder / "checkpoints"))
        self.best_loss = best.valid_loss if best else None
        log.info("resumed from %s at step %d", self.checkpoint.path, state.step)
        return state.step

    def _checked_state(self) -> TrainState:
        assert self.checkpoint
        state = self.checkpoint.state()
        if changed := frozen_differences(state.frozen, self.frozen):
            raise CheckpointError(
                f"{self.checkpoint.path} was trained with other frozen weights than those there now:"
                f" model.{', model.'.join(changed)}."
            )
        return state

    def _load_trained(self, tensors: dict[str, torch.Tensor]) -> None:
        own = dict(self.model.named_parameters())
        trained = set(self._names(trained=True)) if not self.run_config.evaluate else set(tensors)
        if wrong := sorted((trained ^ set(tensors)) | (set(tensors) - set(self._names(trained=False)))):
            raise CheckpointError(
                f"{self.folder}: the checkpoint and the model differ in what is trained: {', '.join(wrong[:8])}."
            )
        with torch.no_grad():
            for name in tensors.keys() & own.keys():
                own[name].copy_(tensors[name])

    def _names(self, *, trained: bool) -> list[str]:
        """Parameters of the whole model, or those that are trained."""
        return (
            list(trainable_parameters(self.model)) if trained else [name for name, _ in self.model.named_parameters()]
        )

    def _count_parameters(self) -> tuple[int, int]:
        """Trainable and all parameters of the whole model."""
        return parameter_counts(self.model)

    # -- beginning and end

    def _describe(self) -> None:
        count, total = self.counts
        names = self._names(trained=True)
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        log.info("training %s of %s parameters: %s", f"{count:,}", f"{total:,}", shown)
        log.info(
            "%d samples, %d steps per epoch, %d steps in all, %d rows per step on %d rank(s) on %s",
            self.data.num_train_samples, self.span.steps_per_epoch, self.span.total_steps, self.data.plan.global_batch,
            self.world.size, self.world.device,
        )  # fmt: skip

    def _finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        count, total = self.counts
        summary |= {"trainable_parameters": count, "total_parameters": total, "run_folder": str(self.folder)}
        written = [self.folder / "config.yaml", self.folder / "metrics.jsonl", self.folder / "report.html"]
        if self.world.is_main and not self.run_config.evaluate:
            checkpoints = complete_checkpoints(self.folder / "checkpoints")
            best = best_checkpoint(checkpoints)
            summary["last"], summary["best"] = str(checkpoints[-1].path), str(best.path) if best else None
            written += [p for p in (plot_loss(self.folder), checkpoints[-1].path) if p]
            if self.run_config.export:
                folder = Path(self.run_config.export)
                folder = folder if folder.is_absolute() else cache_root() / folder
                written += self.task.export(self.model, folder, DTYPES[self.run_config.export_dtype])
        summary["written"] = [str(p) for p in written if p.exists()]
        if self.world.is_main:
            (self.folder / SUMMARY).write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
            for name, value in summary.get("results", {}).items():
                log.info("%s: %.4f", name, value)
            log.info("written:\n  %s", "\n  ".join(summary["written"]))
        self.world.barrier()
        return summary


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Trainable and all parameters of `model`."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())


def _images_in(batch: Batch) -> int:
    return len(batch.tiles)


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of dropout and sampling in one step of one rank: a pure function, so resuming needs no generator state."""
    return (seed * 1_000_003 + step) * 4_099 + rank


def _is_better(loss: float | None, best: float | None) -> bool:
    return loss is not None and (best is None or loss < best)
