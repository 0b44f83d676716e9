"""How one optimiser step is carried out over micro-batches and ranks. The loop calls a strategy; models know nothing of it."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from lavis.common.dist import World
from lavis.common.errors import TrainingError
from lavis.common.schema import RunConfig
from lavis.datasets.types import Batch
from lavis.runners.optim import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
    trainable_parameters,
)
from lavis.tasks.base import Task

BUCKET_BYTES = 64 << 20
"""Gradients are summed over ranks in flat pieces of about this size."""


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did, over all ranks."""

    loss: float
    grad_norm: float
    comm_seconds: float
    parts: dict[str, float] = field(default_factory=dict)


class DataParallelStrategy:
    """One process, or several that hold the same model and sum their gradients once per optimiser step.

    The sum is of exact per-token sums divided by the supervised tokens of the whole global step, so the gradient does not depend on
    how a batch is cut into micro-batches and ranks. Only trainable gradients are ever communicated; a micro-batch that does not
    touch some of them (text only) needs no special care.
    """

    def __init__(self, model: nn.Module, task: Task, run: RunConfig, world: World) -> None:
        self.model, self.task, self.run, self.world = model, task, run, world
        self.optimizer = build_optimizer(model, run)
        self.parameters = list(trainable_parameters(model).values())
        self.scaler = torch.amp.GradScaler(
            world.device.type,
            enabled=self._dtype() == torch.float16,
            init_scale=run.loss_scale or 2.0**16,
            growth_interval=2000 if run.loss_scale is None else 2**31 - 1,
        )

    def _dtype(self) -> torch.dtype | None:
        if not (self.run.amp and getattr(self.task.recipe.model, "enable_autocast", True)) or (self.world.device.type == "cpu" and not self.run.autocast_on_cpu):
            return None
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[self.run.autocast_dtype]

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Mixed precision as the recipe says; nothing on a CPU by default."""
        dtype = self._dtype()
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.world.device.type, dtype)

    def step(self, batches: list[Batch], rate: float, number: int) -> StepResult:
        """Forward, backward and update. Raises TrainingError on all ranks, before the update, when loss or gradient is not finite."""
        self.optimizer.zero_grad(set_to_none=True)
        counts = [self.task.count(b) for b in batches]
        started = time.perf_counter()
        (total,) = self.world.sum(sum(counts))
        comm = time.perf_counter() - started
        losses: dict[str, torch.Tensor] = {}
        for batch in batches:
            with self.autocast():
                out = self.model(batch.to(self.world.device))
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
        if not math.isfinite(loss) or not (math.isfinite(value) or self.scaler.is_enabled()):
            raise TrainingError(
                f"step {number}: the loss is {loss} and the gradient norm {value}; nothing was updated. "
                "Lower run.init_lr, or look at the data of this step; the last checkpoint is intact."
            )
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

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Optimiser state to save."""
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
