"""What steps came to, which stays on the device until someone asks for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from lavis.core.dist import World
from lavis.core.errors import TrainingError
from lavis.core.output import LossOutput
from lavis.objectives.base import Objective


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did, over all ranks.

    seconds: of each phase (forward, backward, comm, optimizer), of this rank, in all steps since the last result; as
    far as a strategy tells them apart.
    """

    loss: float
    grad_norm: float
    parts: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class LossSums:
    """Losses of a step's micro-batches, divided by `total` units and summed; tensors until they are asked for."""

    def __init__(self, objective: Objective, total: float | torch.Tensor) -> None:
        self._total = total
        self._sums: dict[str, torch.Tensor | float] = dict.fromkeys(("loss", *objective.parts), 0.0)

    def add(self, out: LossOutput) -> None:
        """Count a micro-batch in."""
        for name, value in {"loss": out.loss_sum.detach(), **out.parts}.items():
            self._sums[name] = self._sums[name] + value / self._total

    def stacked(self, world: World) -> torch.Tensor:
        """The sums of this rank, loss first."""
        # not torch.tensor(), which waits for the GPU
        return torch.stack([torch.zeros((), dtype=world.exact, device=world.device) + v for v in self._sums.values()])


class Results:
    """Loss, its parts and gradient norm of steps over the ranks of `world`.

    A step that is not finite ends the run, whether it is found in that step or some steps later: all of a run's steps
    are looked at before anything of what they made is kept, judged or shown, so no more than time is lost. scaled:
    whether fp16's loss scaling handles a gradient that is not finite.
    """

    def __init__(self, world: World, parts: tuple[str, ...], *, scaled: bool) -> None:
        self._world, self._parts, self._scaled = world, parts, scaled
        self._numbers: list[int] = []
        self._losses: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []

    def add(self, number: int, sums: LossSums, norm: torch.Tensor) -> None:
        """Keep what step `number` came to. Nothing is read of it."""
        self._numbers.append(number)
        self._losses.append(sums.stacked(self._world))
        self._norms.append(norm.to(self._world.device, self._world.exact))

    def latest(self) -> StepResult:
        """What the last step came to. Called by all ranks, which look at all steps since the last call.

        Raises TrainingError on all of them, naming the first step whose loss or gradient is not finite.
        """
        losses, norms = self._world.total(torch.stack(self._losses)), torch.stack(self._norms)
        rows = torch.cat([norms.unsqueeze(1), losses], 1).tolist()
        steps = list(zip(self._numbers, rows, strict=True))
        self._numbers, self._losses, self._norms = [], [], []
        for number, (norm, loss, *_) in steps:
            if not math.isfinite(loss) or not (math.isfinite(norm) or self._scaled):
                raise TrainingError(
                    f"step {number}: the loss is {loss} and the gradient norm {norm}; nothing was saved. "
                    "Lower optim.lr, or look at the data of this step; the last checkpoint is intact."
                )
        norm, loss, *parts = rows[-1]
        return StepResult(loss, norm, dict(zip(self._parts, parts, strict=True)))
