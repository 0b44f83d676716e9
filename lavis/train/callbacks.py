"""What happens beside the steps: counts, log lines, validation, answers, checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lavis.config.recipe import Recipe
from lavis.core.dist import World
from lavis.core.types import Batch
from lavis.parallel.strategy import Strategy
from lavis.runs.checkpoint import TrainState, prune, save_checkpoint
from lavis.runs.metrics import MetricsLog, peak_memory_bytes
from lavis.train.data import RunData
from lavis.train.evaluator import Evaluator
from lavis.train.loop import Callback, Step

log = logging.getLogger(__name__)

Write = Callable[[str, int, Mapping[str, Any]], None]
"""(kind, step, values) into the metrics of the run; does nothing on a rank that writes none."""


class StepLog(Callback):
    """Counts what a step was made of, writes its line, and stops a run whose images can't be read."""

    def __init__(self, recipe: Recipe, data: RunData, world: World, metrics: MetricsLog | None) -> None:
        self.recipe, self.data, self.world, self.metrics = recipe, data, world, metrics

    def on_step(self, step: Step) -> None:
        """See Callback. Raises TrainingError for too many bad images."""
        batches = step.batches
        samples, supervised, positions, pad, images, bad = self.data.world.sum(
            sum(b.num_samples for b in batches),
            sum(b.supervised_tokens for b in batches),
            sum(b.input_ids.numel() for b in batches),
            sum(b.num_pad for b in batches),
            sum(_images_in(b) for b in batches),
            sum(b.bad_images for b in batches),
        )
        self.data.count_images(step.number, images, bad)
        if not self.metrics or (step.number % self.recipe.log.every and not step.last):
            return
        values = {
            "epoch": step.epoch,
            "loss": step.result.loss,
            **step.result.parts,
            "lr": step.rate,
            "grad_norm": step.result.grad_norm,
            "samples_per_s": samples / step.seconds,
            "tokens_per_s": (positions - pad) / step.seconds,
            "supervised_tokens_per_s": supervised / step.seconds,
            "padding": pad / positions,
            "step_seconds": step.seconds,
            "data_seconds": step.data_seconds,
            "comm_seconds": step.result.comm_seconds,
            "compute_seconds": step.seconds - step.data_seconds - step.result.comm_seconds,
            "peak_memory_gib": peak_memory_bytes(self.world.device) / 2**30,
        }
        self.metrics.train_line(step.number, values)


def _images_in(batch: Batch) -> int:
    images = batch.pixel_values if batch.features is None else batch.features
    return 0 if images is None else len(images)


class Validation(Callback):
    """Loss of the validation splits, every `eval.every` steps (null: at the end of an epoch) and at the end.

    loss: that of the step just done, None if it was not validated.
    """

    def __init__(self, recipe: Recipe, steps_per_epoch: int, evaluator: Evaluator, write: Write) -> None:
        self.every = recipe.eval.every or steps_per_epoch
        self.evaluator, self.write = evaluator, write
        self.loss: float | None = None

    def on_step(self, step: Step) -> None:
        self.loss = None
        if not self.evaluator.data.valid or not (step.last or step.number % self.every == 0):
            return
        values = self.evaluator.validate()
        self.loss = values["loss"]
        self.write("valid", step.number, values)
        log.info("step %d  validation loss %.4f", step.number, self.loss)


class SamplePrompts(Callback):
    """Answers to the same prompts before, during (whenever there is a validation) and after training."""

    def __init__(self, evaluator: Evaluator, validation: Validation, total_steps: int) -> None:
        self.evaluator, self.validation, self.total_steps = evaluator, validation, total_steps

    def on_start(self, done: int) -> None:
        if done == 0:
            self.evaluator.sample_prompts(0)

    def on_step(self, step: Step) -> None:
        if self.validation.loss is not None and not step.last:
            self.evaluator.sample_prompts(step.number)

    def on_end(self) -> None:
        self.evaluator.sample_prompts(self.total_steps)


class Checkpoints(Callback):
    """Checkpoints every `checkpoint.every` steps (null: at the end of an epoch), at the end, and of the best
    validation.

    best: the lowest validation loss so far.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        strategy: Strategy,
        data: RunData,
        validation: Validation,
        frozen: dict[str, str],
        best: float | None,
    ) -> None:
        self.recipe, self.folder, self.strategy, self.frozen = recipe, folder, strategy, frozen
        self.plan, self.validation, self.best = data.plan, validation, best

    def on_step(self, step: Step) -> None:
        loss = self.validation.loss
        better = loss is not None and (self.best is None or loss < self.best)
        every = self.recipe.checkpoint.every or self.plan.steps_per_epoch
        if step.last or step.number % every == 0 or better:
            self._save(step.number, loss)
        if better:
            self.best = loss

    def _save(self, step: int, valid_loss: float | None) -> None:
        # by all ranks together
        strategy = self.strategy
        tensors, optimizer_tensors = strategy.trained_tensors(), strategy.state_tensors()
        if strategy.world.is_main:
            scale = strategy.scaler.state_dict()
            state = TrainState(step, self.plan.global_batch, scale, self.frozen, valid_loss)
            save_checkpoint(self.folder, state, tensors, optimizer_tensors, self.recipe.to_yaml())
            prune(self.folder, self.recipe.checkpoint.keep)
        strategy.world.barrier()


class Tests(Callback):
    """What the answers to the test splits are worth, before and after training. results: `<label>/<split>/<metric>`."""

    def __init__(self, recipe: Recipe, evaluator: Evaluator, write: Write, total_steps: int) -> None:
        self.recipe, self.evaluator, self.write, self.total_steps = recipe, evaluator, write, total_steps
        self.results: dict[str, float] = {}

    def on_start(self, done: int) -> None:
        if done == 0 and self.recipe.eval.before:
            self.results |= self.evaluator.test("before")
            self.write("test", 0, self.results)

    def on_end(self) -> None:
        self.results |= self.evaluator.test("test")
        if self.recipe.eval.blind:
            self.results |= self.evaluator.test("blind", blind=True)
        self.write("test", self.total_steps, self.results)
