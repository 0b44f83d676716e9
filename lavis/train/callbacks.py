"""What happens beside the steps: counts, log lines, validation, answers, checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lavis.config.recipe import Recipe
from lavis.core.dist import World
from lavis.core.types import Batch
from lavis.parallel.flops import Arithmetic
from lavis.parallel.results import StepResult
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
    """Counts what steps were made of, writes lines about those since the last one, and stops a run whose images can't
    be read.
    """

    def __init__(
        self, recipe: Recipe, data: RunData, world: World, arithmetic: Arithmetic, metrics: MetricsLog | None
    ) -> None:
        self.recipe, self.data, self.world = recipe, data, world
        self.arithmetic, self.metrics = arithmetic, metrics
        self._own, self._all, self._seconds, self._steps = Sums(), Sums(), Sums(), 0

    def wants(self, number: int) -> bool:
        return number % self.recipe.log.every == 0

    def on_step(self, step: Step) -> None:
        """See Callback. Raises TrainingError for too many bad images."""
        self._steps += 1
        for batch in step.batches:
            self._own.add(_counts(batch) | self.arithmetic.units(batch))
        self._seconds.add({"step": step.seconds, "data": step.data_seconds, **step.phases})
        if step.result is None:
            return
        counts = self._own.over(self.data.world)
        self._all.add(counts)
        self.data.count_images(step.number, counts["images"], counts["bad_images"])
        if step.last or self.wants(step.number):
            if self.metrics:
                self.metrics.train_line(step.number, self._values(step, step.result))
            self._all, self._seconds, self._steps = Sums(), Sums(), 0

    def _values(self, step: Step, result: StepResult) -> dict[str, float]:
        counts = self._all
        seconds = {name: value / self._steps for name, value in self._seconds.items()}
        return {
            "epoch": step.epoch,
            "loss": result.loss,
            **result.parts,
            "lr": step.rate,
            "grad_norm": result.grad_norm,
            "samples_per_s": counts["samples"] / self._seconds["step"],
            "tokens_per_s": (counts["positions"] - counts["pad"]) / self._seconds["step"],
            "supervised_tokens_per_s": counts["supervised"] / self._seconds["step"],
            "padding": counts["pad"] / counts["positions"],
            **{f"{phase}_seconds": value for phase, value in seconds.items()},
            "compute_seconds": seconds["step"] - seconds["data"] - seconds.get("comm", 0.0),
            **self.arithmetic.shares(counts, self._seconds["step"]),
            "peak_memory_gib": peak_memory_bytes(self.world.device) / 2**30,
        }


class Sums(dict[str, float]):
    """Named numbers that are added up."""

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self[name] = self.get(name, 0.0) + value

    def over(self, world: World) -> dict[str, float]:
        """Over all ranks, which call this together and have the same names; begins anew."""
        totals = dict(zip(self, world.sum(*self.values()), strict=True))
        self.clear()
        return totals


def _counts(batch: Batch) -> dict[str, float]:
    images = batch.pixel_values if batch.features is None else batch.features
    return {
        "samples": batch.num_samples,
        "positions": batch.input_ids.numel(),
        "pad": batch.num_pad,
        "images": 0 if images is None else len(images),
        "bad_images": batch.bad_images,
    }


class Validation(Callback):
    """Loss of the validation splits, every `eval.every` steps (null: at the end of an epoch) and at the end.

    loss: that of the step just done, None if it was not validated.
    """

    def __init__(self, recipe: Recipe, steps_per_epoch: int, evaluator: Evaluator, write: Write) -> None:
        self.every = recipe.eval.every or steps_per_epoch
        self.evaluator, self.write = evaluator, write
        self.loss: float | None = None

    def wants(self, number: int) -> bool:
        return bool(self.evaluator.data.valid) and number % self.every == 0

    def on_step(self, step: Step) -> None:
        self.loss = None
        if not self.evaluator.data.valid or not (step.last or self.wants(step.number)):
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
        self.validation, self.best = validation, best
        self.every = recipe.checkpoint.every or data.plan.steps_per_epoch
        self.global_batch = data.plan.global_batch

    def wants(self, number: int) -> bool:
        return number % self.every == 0

    def on_step(self, step: Step) -> None:
        loss = self.validation.loss
        better = loss is not None and (self.best is None or loss < self.best)
        if step.last or self.wants(step.number) or better:
            self._save(step.number, loss)
        if better:
            self.best = loss

    def _save(self, step: int, valid_loss: float | None) -> None:
        # by all ranks together
        strategy = self.strategy
        tensors, optimizer_tensors = strategy.trained_tensors(), strategy.state_tensors()
        if strategy.world.is_main:
            scale = strategy.scaler.state_dict()
            state = TrainState(step, self.global_batch, scale, self.frozen, valid_loss)
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
