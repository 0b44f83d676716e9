"""How one optimiser step is carried out over micro-batches and ranks.

The loop calls a strategy; models know nothing of it.
"""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from lavis.config.schema import RunConfig
from lavis.core.dist import World
from lavis.core.errors import TrainingError
from lavis.core.types import Batch
from lavis.objectives.base import Task
from lavis.train.optim import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
    trainable_parameters,
)

BUCKET_BYTES = 64 << 20
"""Gradients are summed over ranks in flat pieces of about this size."""


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did, over all ranks."""

    loss: float
    grad_norm: float
    comm_seconds: float
    parts: dict[str, float] = field(default_factory=dict)


class Strategy(ABC):
    """How an optimiser step is carried out. `scaler` is fp16's loss scaling (disabled otherwise)."""

    in_step: bool = False
    """Whether ranks must run the same modules at the same time, because each holds a part of the weights."""

    def __init__(self, model: nn.Module, task: Task, run: RunConfig, world: World) -> None:
        self.model, self.task, self.run, self.world = model, task, run, world
        self.scaler = torch.amp.GradScaler(
            world.device.type,
            enabled=self.dtype() == torch.float16,
            init_scale=run.loss_scale or 2.0**16,
            growth_interval=2000 if run.loss_scale is None else 2**31 - 1,
        )

    def dtype(self) -> torch.dtype | None:
        """Type of mixed precision as the recipe says; none on a CPU by default."""
        if not (self.run.amp and getattr(self.task.recipe.model, "enable_autocast", True)) or (
            self.world.device.type == "cpu" and not self.run.autocast_on_cpu
        ):
            return None
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[self.run.autocast_dtype]

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of a forward."""
        dtype = self.dtype()
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.world.device.type, dtype)

    def ready(self, batch: Batch) -> Batch:
        """`batch` on this rank's device, as the model is to be given it.

        Where `in_step`, all ranks call this together.
        """
        return batch.to(self.world.device)

    @abstractmethod
    def step(self, batches: list[Batch], rate: float, number: int) -> StepResult:
        """Forward, backward and update. Raises TrainingError on all ranks when loss or gradient is not finite."""

    @abstractmethod
    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """What is trained, whole, by name. Called by all ranks; what rank 0 gets is saved."""

    @abstractmethod
    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Optimiser state to save, as `<slot>.<name>`, whole: a checkpoint knows nothing of the layout that made it."""

    @abstractmethod
    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `state_tensors` gave."""

    def check_finite(self, number: int, loss: float, norm: float) -> None:
        """Raise TrainingError for a loss that is not finite, or a gradient that fp16's loss scaling does not handle."""
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            raise TrainingError(
                f"step {number}: the loss is {loss} and the gradient norm {norm}; nothing was saved. "
                "Lower run.init_lr, or look at the data of this step; the last checkpoint is intact."
            )


class DataParallelStrategy(Strategy):
    """One process, or several that hold the same model and sum their gradients once per optimiser step.

    The sum is of exact per-token sums divided by the supervised tokens of the whole global step, so the gradient does
    not depend on
    how a batch is cut into micro-batches and ranks. Only trainable gradients are ever communicated; a micro-batch that
    does not
    touch some of them (text only) needs no special care.
    """

    def __init__(self, model: nn.Module, task: Task, run: RunConfig, world: World) -> None:
        super().__init__(model, task, run, world)
        self.optimizer = build_optimizer(model, run)
        self.parameters = list(trainable_parameters(model).values())

    def step(self, batches: list[Batch], rate: float, number: int) -> StepResult:
        """See Strategy. The error comes before the update."""
        self.optimizer.zero_grad(set_to_none=True)
        counts = [self.task.count(b) for b in batches]
        started = time.perf_counter()
        (total,) = self.world.sum(sum(counts))
        comm = time.perf_counter() - started
        losses: dict[str, torch.Tensor] = {}
        for batch in batches:
            with self.autocast():
                out = self.model(self.ready(batch))
            if out.loss_sum.requires_grad:  # not when all is frozen but the projection and there is no image
                self.scaler.scale(out.loss_sum / total).backward()
            for name, value in {"loss": out.loss_sum.detach(), **out.parts}.items():
                losses[name] = losses.get(name, 0.0) + value / total
        started = time.perf_counter()
        self._sum_gradients()
        sums = self.world.sum(*(v.item() for v in losses.values()))
        comm += time.perf_counter() - started
        means = dict(zip(losses, sums, strict=True))
        norm = self._update(means["loss"], rate, number)
        return StepResult(means.pop("loss"), norm, comm, means)

    def _update(self, loss: float, rate: float, number: int) -> float:
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        value = norm.item()
        self.check_finite(number, loss, value)
        if self.run.grad_norm_clip is not None and math.isfinite(value):
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.run.grad_norm_clip, norm)
        set_learning_rate(self.optimizer, rate)
        self.scaler.step(self.optimizer)  # under fp16, skips a step whose gradient overflowed
        self.scaler.update()
        return value

    def _sum_gradients(self) -> None:
        for p in self.parameters:  # samples that did not touch p count as a gradient of zero, on one rank as on many
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.world.size == 1:
            return
        bucket: list[torch.Tensor] = []
        size = 0
        for p in self.parameters:
            bucket.append(p.grad)
            size += p.grad.nbytes
            if size >= BUCKET_BYTES:
                _all_reduce_flat(bucket)
                bucket, size = [], 0
        _all_reduce_flat(bucket)

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """The parameters themselves."""
        return {name: p.detach() for name, p in trainable_parameters(self.model).items()}

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """See Strategy."""
        return optimizer_tensors(self.optimizer, self.model)

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `state_tensors` gave."""
        load_optimizer_tensors(self.optimizer, self.model, tensors)


def _all_reduce_flat(tensors: list[torch.Tensor]) -> None:
    if not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    for t, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(summed.view_as(t))
