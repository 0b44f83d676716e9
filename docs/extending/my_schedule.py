"""A learning-rate schedule of one's own: the inverse square root of the step (Vaswani et al. 2017)."""

from __future__ import annotations

from lavis.extend import LR_SCHEDULES, Horizon, OptimConfig


@LR_SCHEDULES.register("inverse_sqrt")
def inverse_sqrt(optim: OptimConfig, span: Horizon, step: int) -> float:
    """The rate of `step`, counted from 0 and behind the warm-up: `optim.lr` where that ends, then less and less."""
    begin = max(1, span.warmup_steps)
    return max(optim.min_lr, optim.lr * (begin / max(begin, step)) ** 0.5)
