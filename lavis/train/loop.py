"""The training loop: one for every objective, every strategy and whatever happens beside the steps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lavis.core.types import Batch
from lavis.data.loader import TrainLoader
from lavis.parallel.results import StepResult
from lavis.parallel.strategy import Strategy
from lavis.train.schedules import Horizon, learning_rate


@dataclass(frozen=True)
class Step:
    """An optimiser step that was done, as this rank saw it. number: steps done, this one included.

    result: what it came to; None where no callback wanted to know and finding out takes time. seconds: of the whole
    step; of them data_seconds waiting for its batches. On a GPU a step's own seconds say little, since its work is only
    queued; of all steps up to one with a result they are right, as are those of the phases, which are of these steps.
    """

    number: int
    epoch: int
    last: bool
    rate: float
    result: StepResult | None
    batches: Sequence[Batch]
    seconds: float
    data_seconds: float
    phases: Mapping[str, float]


class Callback:
    """What happens beside the steps. All ranks call all of it, in the same order."""

    def on_start(self, done: int) -> None:
        """Before the first step; `done`: steps done by the run that is resumed, 0 in a new one."""

    def wants(self, number: int) -> bool:
        """Whether `on_step` shows, judges or keeps what comes out of step `number`; of the last one all do."""
        return False

    def on_step(self, step: Step) -> None:
        """After a step."""

    def on_end(self) -> None:
        """After the last step."""


def train_loop(
    strategy: Strategy, loader: TrainLoader, span: Horizon, done: int, callbacks: Sequence[Callback]
) -> float:
    """Train from step `done` to the end of `span`; returns the seconds that the steps took, callbacks included."""
    recipe, learner = strategy.recipe, strategy.learner
    for callback in callbacks:
        callback.on_start(done)
    started = time.perf_counter()
    while done < span.total_steps:
        epoch, first = divmod(done, span.steps_per_epoch)
        began = time.perf_counter()
        for batches in loader.steps(epoch, first):
            loaded = time.perf_counter()
            torch.manual_seed(step_seed(recipe.run.seed, done, strategy.world.rank))
            rate = learning_rate(recipe.optim, span, done)
            done += 1
            last = done == span.total_steps
            report = last or any(callback.wants(done) for callback in callbacks)
            result = strategy.step(learner.objective.before_step(batches, learner), rate, done, report=report)
            phases, ended = strategy.clock.read() if result else {}, time.perf_counter()
            step = Step(done, epoch, last, rate, result, batches, ended - began, loaded - began, phases)
            for callback in callbacks:
                callback.on_step(step)
            if last:
                break
            began = time.perf_counter()
    seconds = time.perf_counter() - started
    for callback in callbacks:
        callback.on_end()
    return seconds


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of dropout and sampling in one step of one rank: a pure function, so resuming needs no generator state."""
    return (seed * 1_000_003 + step) * 4_099 + rank
