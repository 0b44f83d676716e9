"""Learning-rate schedules: pure functions of the step, so that resuming needs no scheduler state.

All warm up linearly over `warmup_steps` from `warmup_lr` (the rate of the very first step) to `lr`, then do what
they are named for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lavis.config.sections import OptimConfig, TrainConfig
from lavis.core.errors import ConfigError
from lavis.core.registries import LR_SCHEDULES


@dataclass(frozen=True)
class Horizon:
    """How long training is: optimiser steps per epoch and in all."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int


def horizon(optim: OptimConfig, train: TrainConfig, steps_per_epoch: int) -> Horizon:
    """Total and warm-up steps. Raises ConfigError when warm-up leaves no step to train."""
    total = train.epochs * steps_per_epoch
    total = min(total, train.max_steps) if train.max_steps else total
    warmup = round(optim.warmup_ratio * total) if optim.warmup_ratio is not None else optim.warmup_steps
    if warmup >= total:
        raise ConfigError(f"warm-up takes {warmup} steps but training has only {total}: lower optim.warmup_steps.")
    return Horizon(steps_per_epoch, total, warmup)


def learning_rate(optim: OptimConfig, span: Horizon, step: int) -> float:
    """The rate of optimiser step `step` (counted from 0)."""
    if step < span.warmup_steps:
        start = optim.lr if optim.warmup_lr < 0 else optim.warmup_lr
        return start + (optim.lr - start) * step / span.warmup_steps
    schedule: Callable[[OptimConfig, Horizon, int], float] = LR_SCHEDULES.get(optim.schedule)
    return schedule(optim, span, step)


def _cosine(optim: OptimConfig, progress: float) -> float:
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@LR_SCHEDULES.register("constant_lr")
def constant_lr(optim: OptimConfig, span: Horizon, step: int) -> float:
    """lr throughout."""
    return optim.lr


@LR_SCHEDULES.register("linear_warmup_cosine_lr")
def linear_warmup_cosine_lr(optim: OptimConfig, span: Horizon, step: int) -> float:
    """Cosine from lr to min_lr, constant within an epoch."""
    epochs = max(1, math.ceil(span.total_steps / span.steps_per_epoch))
    return _cosine(optim, (step // span.steps_per_epoch) / epochs)


@LR_SCHEDULES.register("linear_warmup_cosine_lr_step-wise")
def linear_warmup_cosine_lr_step_wise(optim: OptimConfig, span: Horizon, step: int) -> float:
    """Cosine from lr after warm-up to min_lr at the last step."""
    return _cosine(optim, (step - span.warmup_steps) / max(1, span.total_steps - span.warmup_steps - 1))


@LR_SCHEDULES.register("linear_warmup_step_lr")
def linear_warmup_step_lr(optim: OptimConfig, span: Horizon, step: int) -> float:
    """lr times lr_decay_rate to the power of the epoch, not under min_lr."""
    rate = 1.0 if optim.lr_decay_rate is None else optim.lr_decay_rate
    return max(optim.min_lr, optim.lr * rate ** (step // span.steps_per_epoch))
