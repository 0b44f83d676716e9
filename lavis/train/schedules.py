"""Learning-rate schedules: pure functions of the step, so that resuming needs no scheduler state.

All warm up linearly over `warmup_steps` from `warmup_lr` (the rate of the very first step) to `init_lr`, then do what
they are named for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lavis.config.schema import RunConfig
from lavis.core.errors import ConfigError
from lavis.core.registries import LR_SCHEDULES


@dataclass(frozen=True)
class Horizon:
    """How long training is: optimiser steps per epoch and in all."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int


def horizon(run: RunConfig, steps_per_epoch: int) -> Horizon:
    """Total and warm-up steps of `run`. Raises ConfigError when warm-up leaves no step to train."""
    total = run.max_epoch * steps_per_epoch
    total = min(total, run.max_steps) if run.max_steps else total
    warmup = round(run.warmup_ratio * total) if run.warmup_ratio is not None else run.warmup_steps
    if warmup >= total:
        raise ConfigError(f"warm-up takes {warmup} steps but training has only {total}: lower run.warmup_steps.")
    return Horizon(steps_per_epoch, total, warmup)


def learning_rate(run: RunConfig, span: Horizon, step: int) -> float:
    """The rate of optimiser step `step` (counted from 0)."""
    if step < span.warmup_steps:
        start = run.init_lr if run.warmup_lr < 0 else run.warmup_lr
        return start + (run.init_lr - start) * step / span.warmup_steps
    schedule: Callable[[RunConfig, Horizon, int], float] = LR_SCHEDULES.get(run.lr_sched)
    return schedule(run, span, step)


def _cosine(run: RunConfig, progress: float) -> float:
    return run.min_lr + (run.init_lr - run.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@LR_SCHEDULES.register("constant_lr")
def constant_lr(run: RunConfig, span: Horizon, step: int) -> float:
    """init_lr throughout."""
    return run.init_lr


@LR_SCHEDULES.register("linear_warmup_cosine_lr")
def linear_warmup_cosine_lr(run: RunConfig, span: Horizon, step: int) -> float:
    """Cosine from init_lr to min_lr, constant within an epoch."""
    epochs = max(1, math.ceil(span.total_steps / span.steps_per_epoch))
    return _cosine(run, (step // span.steps_per_epoch) / epochs)


@LR_SCHEDULES.register("linear_warmup_cosine_lr_step-wise")
def linear_warmup_cosine_lr_step_wise(run: RunConfig, span: Horizon, step: int) -> float:
    """Cosine from init_lr after warm-up to min_lr at the last step."""
    return _cosine(run, (step - span.warmup_steps) / max(1, span.total_steps - span.warmup_steps - 1))


@LR_SCHEDULES.register("linear_warmup_step_lr")
def linear_warmup_step_lr(run: RunConfig, span: Horizon, step: int) -> float:
    """init_lr times lr_decay_rate to the power of the epoch, not under min_lr."""
    rate = 1.0 if run.lr_decay_rate is None else run.lr_decay_rate
    return max(run.min_lr, run.init_lr * rate ** (step // span.steps_per_epoch))
