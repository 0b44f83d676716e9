"""An optimiser step by DeepSpeed's engine: ZeRO stages 0 to 3, with its offload options."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import deepspeed
import deepspeed.runtime.zero.linear
import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import nn

from lavis.config.schema import RunConfig
from lavis.core.dist import World
from lavis.core.errors import ConfigError
from lavis.core.types import Batch
from lavis.models.llm import logits_rows
from lavis.objectives.base import Task
from lavis.parallel.strategy import StepResult, Strategy
from lavis.train.optim import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
    trainable_parameters,
)

_OURS = ("optimizer", "scheduler", "bf16", "fp16", "amp", "train_batch_size")
"""Parts of a recipe's section that are said elsewhere in the recipe: see lavis.config.deepspeed."""
_SLOTS = ("exp_avg", "exp_avg_sq")
"""AdamW's tensors of a parameter's shape; `step` is beside them."""
_PERSISTENT = 100_000
"""ZeRO-3 keeps parameters of at most this many elements whole on every rank, if the recipe does not say otherwise."""
_BUCKET = 500_000_000
"""Gradients of at most this many elements are summed over ranks at a time, likewise."""


def zero_stage(run: RunConfig) -> int:
    """The ZeRO stage of a recipe, 0 if it names none."""
    return int((run.deepspeed_config.get("zero_optimization") or {}).get("stage", 0))


def engine_config(
    run: RunConfig, dtype: torch.dtype | None, accumulation: int, kept_whole: int = 0, trained: int = 0
) -> dict[str, Any]:
    """What DeepSpeed is given: the recipe's section, with what the recipe says elsewhere filled in.

    `kept_whole`: elements of the largest parameter that must be whole on every rank under ZeRO-3. `trained`: elements
    that are trained, which need no larger
    buffer (by default DeepSpeed takes 2 GB whatever there is to sum).

    Mixed precision is torch's, as everywhere here: trained weights stay fp32, and their gradients are summed in fp32.
    """
    config = {key: value for key, value in run.deepspeed_config.items() if key not in _OURS}
    config |= {
        "train_micro_batch_size_per_gpu": run.batch_size_train,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": run.grad_norm_clip or 0.0,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": config.get("steps_per_print") or 2**31 - 1,
    }
    if dtype is not None:
        name = {torch.bfloat16: "bfloat16", torch.float16: "float16"}[dtype]
        config["torch_autocast"] = {"enabled": True, "dtype": name, "lower_precision_safe_modules": []}
    zero = dict(config.get("zero_optimization") or {})
    if zero.get("stage") == 3:
        key = "stage3_param_persistence_threshold"
        zero[key] = max(zero.get(key, _PERSISTENT), kept_whole)
    if zero and trained:
        zero["reduce_bucket_size"] = min(int(zero.get("reduce_bucket_size", _BUCKET)), trained)
    return config | ({"zero_optimization": zero} if zero else {})


class Linear(LinearFunctionForZeroStage3):
    """ZeRO-3's linear layer, which keeps no weight for the backward pass; this one keeps no input either where the
    weight is frozen.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """See torch.autograd.Function."""
        x, *others = inputs
        LinearFunctionForZeroStage3.setup_context(
            ctx, (x if ctx.needs_input_grad[1] else x.new_empty(0), *others), output
        )


class DeepSpeedStrategy(Strategy):
    """ZeRO: optimiser state (1), gradients (2) and weights, the frozen ones too (3), each split over the ranks.

    Loss and gradient are those of DataParallelStrategy, and so are the checkpoints: one made here goes on there, on any
    number of ranks.
    """

    def __init__(self, model: nn.Module, task: Task, run: RunConfig, world: World, accumulation: int) -> None:
        super().__init__(model, task, run, world)
        self.stage = zero_stage(run)
        self.in_step = self.stage == 3 and world.size > 1
        self.optimizer = build_optimizer(model, run)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        towers = [m for m in (model, getattr(model, "visual_encoder", None)) if m is not None]
        # used without a forward, or a backward, that DeepSpeed sees
        self.unhooked = [p for m in towers for p in m.parameters(recurse=False)]
        kept_whole = max((p.numel() for p in self.unhooked), default=0)
        trained = sum(p.numel() for p in trainable_parameters(model).values())
        config = engine_config(run, self.dtype(), accumulation, kept_whole, trained)
        try:
            self.engine, *_ = deepspeed.initialize(
                model=model, optimizer=self.optimizer, config=config, dist_init_required=False
            )
        except (
            ValueError,
            TypeError,
            AssertionError,
            KeyError,
            deepspeed.runtime.zero.utils.ZeRORuntimeException,
        ) as error:
            raise ConfigError(f"DeepSpeed does not accept run.deepspeed_config: {error}") from error
        if self.stage == 3:
            deepspeed.runtime.zero.linear.LinearFunctionForZeroStage3 = Linear
            for module, parameter in model.borrowed_parameters() if hasattr(model, "borrowed_parameters") else ():
                deepspeed.zero.register_external_parameter(module, parameter)
            for buffer in model.buffers():
                buffer.data = buffer.data.to(world.device)
            # DeepSpeed waits for the first training step; sample prompts come before
            _gather(self.engine.optimizer.persistent_parameters)
        self._place_scaler()

    def _place_scaler(self) -> None:
        """DeepSpeed makes a loss scaler of its own; it gets ours, which starts where the recipe says and is in
        checkpoints.
        """
        if not self.scaler.is_enabled():
            return
        if self.stage:
            self.engine.optimizer.torch_autocast_gradscaler = self.scaler
        else:
            self.engine.torch_autocast_z0_gradscaler = self.scaler

    def step(self, batches: list[Batch], rate: float, number: int) -> StepResult:
        """See Strategy. The error comes before anything is saved."""
        started = time.perf_counter()
        (total,) = self.world.sum(sum(self.task.count(b) for b in batches))
        comm = time.perf_counter() - started
        losses: dict[str, torch.Tensor] = {}
        set_learning_rate(self.optimizer, rate)
        norm = 0.0
        for i, batch in enumerate(batches):
            with self.autocast():
                out = self.engine(self.ready(batch))
            if self.stage == 3:
                _gather(self.unhooked)
            # DeepSpeed takes the mean over ranks of what each rank sums
            self.engine.backward(out.loss_sum / total * self.world.size, scale_wrt_gas=False)
            for name, value in {"loss": out.loss_sum.detach(), **out.parts}.items():
                losses[name] = losses.get(name, 0.0) + value / total
            if self.stage == 0 and i == len(batches) - 1:
                norm = self._whole_norm()
            self.engine.step()
        started = time.perf_counter()
        means = dict(zip(losses, self.world.sum(*(v.item() for v in losses.values())), strict=True))
        comm += time.perf_counter() - started
        if self.stage:
            norm = float(self.engine.get_global_grad_norm())
        self.check_finite(number, means["loss"], norm)
        return StepResult(means.pop("loss"), norm, comm, means)

    def _whole_norm(self) -> float:
        grads = [p.grad for p in trainable_parameters(self.model).values() if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads).item() / (
            self.scaler.get_scale() if self.scaler.is_enabled() else 1.0
        )

    def ready(self, batch: Batch) -> Batch:
        """See Strategy. DeepSpeed wants a gradient from every micro-batch, so one without images is given an image that
        has no place in it.

        Under ZeRO-3 ranks fetch weights together, so each calls the LLM's head as often as the one with the most
        labels.
        """
        config: Any = self.task.recipe.model
        if batch.pixel_values is None and batch.features is None and hasattr(self.model, "tower_frozen"):
            if self.in_step or not self.model.tower_frozen:
                batch = replace(batch, pixel_values=torch.zeros(1, 3, config.image_size, config.image_size))
            else:
                batch = replace(batch, features=torch.empty(0, config.num_query_token, config.qformer.hidden_size))
        if self.in_step and hasattr(self.model, "logits_chunks"):
            (most,) = self.world.max(batch.supervised_tokens)
            self.model.logits_chunks = max(1, math.ceil(most / logits_rows(self.model.llm_model)))
        return batch.to(self.world.device)

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """See Strategy; put together from the parts of all ranks."""
        if self.stage == 0:
            return {name: p.detach() for name, p in trainable_parameters(self.model).items()}
        return self._gathered({name: (p, None) for name, p in trainable_parameters(self.model).items()})

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """See Strategy; put together from the parts of all ranks."""
        if self.stage == 0:
            return optimizer_tensors(self.optimizer, self.model)
        self._link_state()
        named = trainable_parameters(self.model)
        tensors = self._gathered({f"{slot}.{name}": (p, slot) for name, p in named.items() for slot in _SLOTS})
        steps = [state["step"] for state in self.optimizer.state.values() if "step" in state]
        return tensors | {f"step.{name}": steps[0].detach().cpu().reshape(1).float().clone() for name in named}

    def _gathered(self, wanted: Mapping[str, tuple[nn.Parameter, str | None]]) -> dict[str, torch.Tensor]:
        """Whole tensors on the CPU of rank 0, one after another, so that no other rank holds more than one."""
        found: dict[str, torch.Tensor] = {}
        for key, (p, slot) in wanted.items():
            whole = safe_get_full_fp32_param(p) if slot is None else safe_get_full_optimizer_state(p, slot)
            if self.world.is_main:
                found[key] = whole.detach().cpu().clone()
        return found

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """See Strategy; each rank takes its part."""
        if self.stage == 0:
            load_optimizer_tensors(self.optimizer, self.model, tensors)
            return
        named, zero = trainable_parameters(self.model), self.engine.optimizer
        step = next((v for k, v in tensors.items() if k.startswith("step.")), torch.zeros(1)).reshape(())
        flats = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for flat in flats:  # as AdamW would at its first step
            self.optimizer.state[flat] = {"step": step.clone(), **{slot: torch.zeros_like(flat) for slot in _SLOTS}}
        self._link_state()
        for name, p in named.items():
            for slot in _SLOTS:
                value = tensors[f"{slot}.{name}"].to(flats[0].device)
                if self.stage == 3:
                    safe_set_local_optimizer_state(p, self._part(value, p.ds_tensor.ds_numel), slot)
                else:
                    safe_set_full_optimizer_state(p, value, slot)

    def _link_state(self) -> None:
        """Let each parameter find its state under ZeRO-1 and 2.

        DeepSpeed does it too early: when the first of the groups has been updated.
        """
        zero = self.engine.optimizer
        if self.stage < 3:
            for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(parameters, flat, self.optimizer.state)

    def _part(self, value: torch.Tensor, size: int) -> torch.Tensor:
        """This rank's part of a tensor that ZeRO-3 splits into parts of `size`, the last one padded."""
        padded = F.pad(value.flatten(), (0, size * self.world.size - value.numel()))
        return padded.narrow(0, size * self.world.rank, size)


def _gather(parameters: list[nn.Parameter]) -> None:
    """Make those of ZeRO-3's `parameters` whole that are not."""
    if absent := [p for p in parameters if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]:
        absent[0].all_gather(absent)
