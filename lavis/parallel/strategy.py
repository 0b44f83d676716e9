"""How a model lies on ranks, and how one optimiser step is carried out over micro-batches and ranks.

The loop calls a strategy; models know nothing of it.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from lavis.config.init import inits
from lavis.config.recipe import Recipe
from lavis.core.dist import World
from lavis.core.errors import CheckpointError
from lavis.core.registries import MODELS, STRATEGIES
from lavis.core.types import Batch
from lavis.objectives.base import Objective
from lavis.objectives.learner import Learner
from lavis.parallel.clock import Clock
from lavis.parallel.layout import BUCKET_BYTES, Layout
from lavis.parallel.optim import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
    trainable_parameters,
)
from lavis.parallel.prefetch import prefetched
from lavis.parallel.results import LossSums, Results, StepResult

if TYPE_CHECKING:
    from lavis.parallel.plan import Planner

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Ranks:
    """Who works with whom. world: all ranks; data: those over which samples are split, of which this is one.

    stage: which part of the model this rank has. pipe: the ranks that have the others, in order, and their group.
    """

    world: World
    data: World
    stage: int = 0
    pipe: tuple[int, ...] = (0,)
    pipe_group: dist.ProcessGroup | None = None

    @property
    def sees(self) -> bool:
        """Whether this rank needs images."""
        return self.stage == 0


class Strategy(ABC):
    """How a model lies on ranks and is trained there; the class methods are asked before there is one to train.

    learner: what is trained, and validated and asked meanwhile. accumulation: micro-batches of an optimiser step on
    each rank. scaler: fp16's loss scaling (disabled otherwise). results: of its steps. clock: of their phases.
    """

    grouped: ClassVar[bool] = False
    """Whether a process group is needed also for a single rank."""

    def __init__(self, learner: Learner, recipe: Recipe, ranks: Ranks, accumulation: int) -> None:
        self.learner, self.recipe, self.ranks, self.world = learner, recipe, ranks, ranks.world
        self.accumulation = accumulation
        self.dtype = mixed_precision(recipe, ranks.world.device)
        self.scaler = torch.amp.GradScaler(
            ranks.world.device.type,
            enabled=self.dtype == torch.float16,
            init_scale=self.recipe.train.loss_scale or 2.0**16,
            growth_interval=2000 if self.recipe.train.loss_scale is None else 2**31 - 1,
        )
        self.results = Results(ranks.world, learner.objective.parts, scaled=self.scaler.is_enabled())
        self.clock = Clock(ranks.world.device)
        self.waits = ranks.world.device.type == "cpu"
        """Whether every step is looked at when it is done. Elsewhere the device would stand still meanwhile."""

    @classmethod
    def require(cls, recipe: Recipe) -> None:
        """Raise ConfigError if what it is built on is missing; before there is a process group."""
        return  # most need nothing that is not there

    @classmethod
    def split(cls, recipe: Recipe, world: World) -> Ranks:
        """How the ranks of `world` work together. Raises ConfigError if they are too few or too many."""
        return Ranks(world, world)

    @classmethod
    @abstractmethod
    def layout(cls, recipe: Recipe, world: World) -> Layout:
        """How the run lies on the ranks, for its plan."""

    @classmethod
    @abstractmethod
    def build(
        cls, recipe: Recipe, tokenizer: Any, objective: Objective, ranks: Ranks, planner: Callable[[], Planner]
    ) -> Learner:
        """The model, or this rank's part of it, on its device with its weights, to be evaluated or trained.

        planner: gives the plans of the run on this hardware, where a rank's part follows from them.
        """

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of a forward."""
        return contextlib.nullcontext() if self.dtype is None else torch.autocast(self.world.device.type, self.dtype)

    @abstractmethod
    def step(self, batches: list[Batch], rate: float, number: int, *, report: bool = True) -> StepResult | None:
        """Forward, backward and update.

        report: whether what the step came to is to be known; it always is where the strategy `waits`. Raises
        TrainingError on all ranks when loss or gradient is not finite, of this step or one since the last report.
        """

    def reported(self, report: bool) -> StepResult | None:
        """What `step` returns, once `results` has the step."""
        return self.results.latest() if report or self.waits else None

    @abstractmethod
    def trained_tensors(self) -> Tensors:
        """What is trained, whole, by name. Called by all ranks; what rank 0 gets is saved."""

    @abstractmethod
    def state_tensors(self) -> Tensors:
        """Optimiser state to save, as `<slot>.<name>`, whole: a checkpoint knows nothing of the layout that made it."""

    @abstractmethod
    def load_state_tensors(self, tensors: Tensors) -> None:
        """Restore what `state_tensors` gave."""

    def units(self, batches: Iterable[Batch]) -> float | torch.Tensor:
        """Of the whole global step; of several ranks as a tensor that no one waits for."""
        own, data = sum(self.learner.objective.units(b) for b in batches), self.ranks.data
        if data.size == 1:
            return own
        return data.total(torch.full((), own, dtype=data.exact, device=data.device)).float()


def mixed_precision(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    """Type of mixed precision on `device` as the recipe says; none on a CPU by default."""
    if not (recipe.train.amp and getattr(recipe.model, "enable_autocast", True)) or (
        device.type == "cpu" and not recipe.train.autocast_on_cpu
    ):
        return None
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[recipe.train.autocast_dtype]


@STRATEGIES.register("data_parallel")
class DataParallel(Strategy):
    """One process, or several that hold the same model and sum their gradients once per optimiser step.

    The sum is of exact per-token sums divided by the supervised tokens of the whole global step, so the gradient does
    not depend on how a batch is cut into micro-batches and ranks. Only trainable gradients are ever communicated; a
    micro-batch that does not touch some of them (text only) needs no special care.
    """

    def __init__(self, learner: Learner, recipe: Recipe, ranks: Ranks, accumulation: int) -> None:
        super().__init__(learner, recipe, ranks, accumulation)
        self.optimizer = build_optimizer(learner.model, self.recipe.optim, fused=ranks.world.device.type == "cuda")
        self.parameters = list(trainable_parameters(learner.model).values())

    @classmethod
    def layout(cls, recipe: Recipe, world: World) -> Layout:
        return Layout(world.size)

    @classmethod
    def build(
        cls, recipe: Recipe, tokenizer: Any, objective: Objective, ranks: Ranks, planner: Callable[[], Planner]
    ) -> Learner:
        """See Strategy: the whole model."""
        model = whole_model(recipe, tokenizer, ranks.world.device).to(ranks.world.device)
        return Learner(model, objective, ranks.data)

    def step(self, batches: list[Batch], rate: float, number: int, *, report: bool = True) -> StepResult | None:
        """See Strategy. The error comes before the update of a step that is reported."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.clock("comm"):
            total = self.units(batches)
        sums = LossSums(self.learner.objective, total)
        for batch in prefetched(batches, self.learner.ready, self.world.device):
            with self.clock("forward"), self.autocast():
                out = self.learner(batch)
            if out.loss_sum.requires_grad:  # not when all is frozen but the projection and there is no image
                with self.clock("backward"):
                    self.scaler.scale(out.loss_sum / total).backward()
            sums.add(out)
        with self.clock("comm"):
            self._sum_gradients()
        with self.clock("optimizer"):
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        self.results.add(number, sums, norm)
        result = self.reported(report)
        with self.clock("optimizer"):
            self._update(norm, rate)
        return result

    def _update(self, norm: torch.Tensor, rate: float) -> None:
        if self.recipe.optim.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.recipe.optim.max_grad_norm, norm)
        set_learning_rate(self.optimizer, rate)
        self.scaler.step(self.optimizer)  # under fp16, skips a step whose gradient overflowed
        self.scaler.update()

    def _sum_gradients(self) -> None:
        bucket: list[torch.Tensor] = []
        size = 0
        for p in self.parameters:  # samples that did not touch p count as a gradient of zero, on one rank as on many
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if self.world.size == 1:
                continue
            bucket.append(p.grad)
            size += p.grad.nbytes
            if size >= BUCKET_BYTES:
                _all_reduce_flat(bucket)
                bucket, size = [], 0
        _all_reduce_flat(bucket)

    def trained_tensors(self) -> Tensors:
        """The parameters themselves."""
        return {name: p.detach() for name, p in trainable_parameters(self.learner.model).items()}

    def state_tensors(self) -> Tensors:
        return optimizer_tensors(self.optimizer, self.learner.model)

    def load_state_tensors(self, tensors: Tensors) -> None:
        load_optimizer_tensors(self.optimizer, self.learner.model, tensors)


def whole_model(recipe: Recipe, tokenizer: Any, device: torch.device) -> nn.Module:
    """The recipe's model on the CPU, its weights loaded, frozen parts in the precision that suits `device`."""
    init = {"init": inits(recipe.init)} if recipe.init else {}
    return MODELS.get(recipe.model.arch).from_config(recipe.model, tokenizer, device=device, **init)


def _all_reduce_flat(tensors: list[torch.Tensor]) -> None:
    if not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    for t, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(summed.view_as(t))


# ---- the whole model, of which each rank has a part or all


def tensor_names(learner: Learner, world: World, *, trained: bool) -> list[str]:
    """Names of the parameters of the whole model, or of those that are trained. Called by all ranks."""
    own = [name for name, p in learner.tensors().items() if p.requires_grad or not trained]
    return list(dict.fromkeys(name for names in world.gather(own) for name in names))


def parameter_counts(learner: Learner, ranks: Ranks) -> tuple[int, int]:
    """Trainable and all parameters of the whole model. Called by all ranks."""
    own = learner.tensors().values()
    trained, total = ranks.world.sum(sum(p.numel() for p in own if p.requires_grad), sum(p.numel() for p in own))
    return round(trained / ranks.data.size), round(total / ranks.data.size)


def load_trained(
    learner: Learner, tensors: Mapping[str, torch.Tensor], world: World, *, where: str, all_of_it: bool
) -> None:
    """Give the parameters of this rank what the checkpoint `where` holds for them. Called by all ranks.

    all_of_it: what is trained has to be what the checkpoint holds. Raises CheckpointError where the two differ.
    """
    trained = set(tensor_names(learner, world, trained=True)) if all_of_it else set(tensors)
    unknown = set(tensors) - set(tensor_names(learner, world, trained=False))
    if wrong := sorted((trained ^ set(tensors)) | unknown):
        raise CheckpointError(
            f"{where}: the checkpoint and the model differ in what is trained: {', '.join(wrong[:8])}."
        )
    own = learner.tensors()
    with torch.no_grad():
        for name in tensors.keys() & own.keys():
            own[name].copy_(tensors[name])
