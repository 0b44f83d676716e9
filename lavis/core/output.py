"""What an objective returns of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class LossOutput:
    """A loss as sum and count, so that a strategy can divide by the count of the whole global step.

    loss_sum: fp32 scalar, summed over `count` units (supervised tokens; images in BLIP-2's first stage).
    parts: detached named sums over the same units, for the log (e.g. the three losses of the first stage).
    """

    loss_sum: torch.Tensor
    count: int
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
