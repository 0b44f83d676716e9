"""An optimiser step by DeepSpeed's engine: ZeRO stages 0 to 3, with its offload options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lavis.config.recipe import Recipe
from lavis.core.dist import World
from lavis.core.registries import STRATEGIES
from lavis.core.types import Batch
from lavis.generation.decoding import Decoder, LocalDecoder
from lavis.objectives.base import Objective
from lavis.objectives.learner import Learner
from lavis.parallel.deepspeed_setup import build_operators, require_deepspeed
from lavis.parallel.layout import Layout
from lavis.parallel.optim import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
    trainable_parameters,
)
from lavis.parallel.prefetch import prefetched
from lavis.parallel.results import LossSums, StepResult
from lavis.parallel.strategy import Ranks, Strategy, Tensors, whole_model

if TYPE_CHECKING:
    from lavis.parallel.plan import Planner

_OURS = ("optimizer", "scheduler", "bf16", "fp16", "amp", "train_batch_size")
"""Parts of a recipe's section that are said elsewhere in the recipe: see lavis.config.deepspeed."""
_PERSISTENT = 100_000
"""ZeRO-3 keeps parameters of at most this many elements whole on every rank, if the recipe does not say otherwise."""
_BUCKET = 500_000_000
"""Gradients of at most this many elements are summed over ranks at a time, likewise."""


def zero_stage(recipe: Recipe) -> int:
    """The ZeRO stage of a recipe, 0 if it names none."""
    return int((recipe.parallel.deepspeed.get("zero_optimization") or {}).get("stage", 0))


def engine_config(
    recipe: Recipe, dtype: torch.dtype | None, accumulation: int, kept_whole: int = 0, trained: int = 0
) -> dict[str, Any]:
    """What DeepSpeed is given: the recipe's section, with what the recipe says elsewhere filled in.

    `kept_whole`: elements of the largest parameter that must be whole on every rank under ZeRO-3. `trained`: elements
    that are trained, which need no larger buffer (by default DeepSpeed takes 2 GB whatever there is to sum).

    Mixed precision is torch's, as everywhere here: trained weights stay fp32, and their gradients are summed in fp32.
    """
    config = {key: value for key, value in recipe.parallel.deepspeed.items() if key not in _OURS}
    config |= {
        "train_micro_batch_size_per_gpu": recipe.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.optim.max_grad_norm or 0.0,
        # torch's AdamW, as everywhere: DeepSpeed's own rounds otherwise, and a run could not go on under another layout
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": config.get("steps_per_print") or 2**31 - 1,
    }
    if dtype is not None:
        name = {torch.bfloat16: "bfloat16", torch.float16: "float16"}[dtype]
        # no module counts as safe for sums in a lower precision: gradients cross in fp32
        config["torch_autocast"] = {"enabled": True, "dtype": name, "lower_precision_safe_modules": []}
    zero = dict(config.get("zero_optimization") or {})
    if zero.get("stage") == 3:
        key = "stage3_param_persistence_threshold"
        zero[key] = max(zero.get(key, _PERSISTENT), kept_whole)
    if zero and trained:
        zero["reduce_bucket_size"] = min(int(zero.get("reduce_bucket_size", _BUCKET)), trained)
    return config | ({"zero_optimization": zero} if zero else {})


@STRATEGIES.register("zero")
class Zero(Strategy):
    """ZeRO: optimiser state (1), gradients (2) and weights, the frozen ones too (3), each split over the ranks.

    Loss and gradient are those of DataParallel, and so are the checkpoints: one made here goes on there, on any number
    of ranks.
    """

    grouped = True

    def __init__(self, learner: Learner, recipe: Recipe, ranks: Ranks, accumulation: int) -> None:
        from lavis.parallel.zero_engine import ZeroEngine

        self.stage = zero_stage(recipe)
        learner = ZeroLearner(learner, in_step=self.stage == 3 and ranks.world.size > 1)
        if self.stage == 3:  # fetches weights in the order of the first step, where this would run the blocks once more
            learner.model.shares_beginnings = False
        super().__init__(learner, recipe, ranks, accumulation)
        with self.world.local_main_first():
            build_operators()
        self.optimizer = build_optimizer(learner.model, self.recipe.optim)
        self.named = trainable_parameters(learner.model)
        unhooked = learner.model.unhooked_parameters()
        kept_whole = max((p.numel() for p in unhooked), default=0)
        trained = sum(p.numel() for p in self.named.values())
        self.engine = ZeroEngine(
            learner,
            self.optimizer,
            engine_config(self.recipe, self.dtype, accumulation, kept_whole, trained),
            self.stage,
            unhooked=unhooked,
            borrowed=learner.model.borrowed_parameters(),
            device=self.world.device,
        )
        if self.scaler.is_enabled():
            self.engine.use_scaler(self.scaler)

    @classmethod
    def require(cls, recipe: Recipe) -> None:
        """See Strategy: DeepSpeed."""
        require_deepspeed(recipe)

    @classmethod
    def layout(cls, recipe: Recipe, world: World) -> Layout:
        return Layout(world.size, zero=zero_stage(recipe))

    @classmethod
    def build(
        cls, recipe: Recipe, tokenizer: Any, objective: Objective, ranks: Ranks, planner: Callable[[], Planner]
    ) -> Learner:
        """See Strategy: the whole model, but an LLM that no rank has room for stays on the CPU until it is split."""
        device = ranks.world.device
        model = whole_model(recipe, tokenizer, device)
        if zero_stage(recipe) < 3 or recipe.run.evaluate:
            return Learner(model.to(device), objective, ranks.data)
        for name, part in model.named_children():
            if name != "llm_model":
                part.to(device)
        for p in model.parameters(recurse=False):
            p.data = p.data.to(device)
        return Learner(model, objective, ranks.data)

    def step(self, batches: list[Batch], rate: float, number: int, *, report: bool = True) -> StepResult | None:
        """See Strategy. The error comes before anything is saved."""
        with self.clock("comm"):
            total = self.units(batches)
        sums = LossSums(self.learner.objective, total)
        set_learning_rate(self.optimizer, rate)
        for i, batch in enumerate(prefetched(batches, self.learner.ready, self.world.device)):
            with self.clock("forward"), self.autocast():
                out = self.engine.forward(batch)
            # DeepSpeed takes the mean over ranks of what each rank sums
            with self.clock("backward"):
                self.engine.backward(out.loss_sum / total * self.world.size)
            sums.add(out)
            # the engine of stage 0 does not say its norm, and the last step() takes the gradients away
            if self.stage == 0 and i == len(batches) - 1:
                norm = self._whole_norm()
            with self.clock("optimizer"):
                self.engine.step()
        if self.stage:
            norm = self.engine.norm()
        self.results.add(number, sums, norm)
        return self.reported(report)

    def _whole_norm(self) -> torch.Tensor:
        grads = [p.grad for p in self.named.values() if p.grad is not None]
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else 1.0
        return torch.nn.utils.get_total_norm(grads) / scale

    def trained_tensors(self) -> Tensors:
        """See Strategy; put together from the parts of all ranks."""
        if self.stage == 0:
            return {name: p.detach() for name, p in self.named.items()}
        return self._gathered({name: (p, None) for name, p in self.named.items()})

    def state_tensors(self) -> Tensors:
        """See Strategy; put together from the parts of all ranks."""
        from lavis.parallel.zero_engine import SLOTS

        if self.stage == 0:
            return optimizer_tensors(self.optimizer, self.learner.model)
        self.engine.link_state()
        tensors = self._gathered({f"{slot}.{name}": (p, slot) for name, p in self.named.items() for slot in SLOTS})
        done = self.engine.steps_done().detach().cpu().reshape(1).float()
        return tensors | {f"step.{name}": done.clone() for name in self.named}

    def _gathered(self, wanted: Mapping[str, tuple[nn.Parameter, str | None]]) -> Tensors:
        """Whole tensors on the CPU of rank 0, one after another, so that no other rank holds more than one."""
        found: Tensors = {}
        for key, (p, slot) in wanted.items():
            whole = self.engine.whole(p, slot)
            if self.world.is_main:
                found[key] = whole.detach().cpu().clone()
        return found

    def load_state_tensors(self, tensors: Tensors) -> None:
        """See Strategy; each rank takes its part."""
        if self.stage == 0:
            load_optimizer_tensors(self.optimizer, self.learner.model, tensors)
        else:
            self.engine.load_state(self.named, tensors, self.world.rank)


class ZeroLearner(Learner):
    """A learner that DeepSpeed's engine runs. in_step: the weights are split over the ranks."""

    def __init__(self, learner: Learner, *, in_step: bool) -> None:
        super().__init__(learner.model, learner.objective, learner.world)
        self.in_step = in_step

    def scorer(self) -> Any:
        """See Learner. Ranks that fetch weights together call the head as often as the one with the most positions."""
        return self.model.scorer(self._most if self.in_step else None)

    def _most(self, calls: int) -> int:
        (most,) = self.world.max(calls)
        return int(most)

    def ready(self, batch: Batch) -> Batch:
        """See Learner. DeepSpeed wants a gradient of every trained part from every micro-batch; and ranks that fetch
        weights together have to run the same parts.
        """
        return self.model.filler(batch, run_frozen=self.in_step).to(self.world.device)

    def decoder(self) -> Decoder:
        return LockstepDecoder(self.model, self.world) if self.in_step else LocalDecoder(self.model)


class LockstepDecoder(LocalDecoder):
    """Each rank continues rows of its own, but all run the model at the same time, as each holds a part of it."""

    synced = True

    def __init__(self, model: Any, world: World) -> None:
        super().__init__(model)
        self.world = world

    def goes_on(self, unfinished: bool) -> bool:
        """See Decoder: as long as any rank has rows."""
        (most,) = self.world.max(unfinished)
        return most > 0

    def step(self, tokens: Sequence[int]) -> torch.Tensor | None:
        """See Decoder; without rows, a token that nobody asked for keeps the others company."""
        if tokens:
            return super().step(tokens)
        self.llm(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self._device), use_cache=False)
        return None
