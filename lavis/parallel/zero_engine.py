"""DeepSpeed's ZeRO engine, and all that is touched of its inside. Imported only where DeepSpeed is used.

Whatever is not in DeepSpeed's documentation is used here because no public call does it; each place says why. It was
read in DeepSpeed 0.19.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
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

from lavis.core.errors import ConfigError

SLOTS = ("exp_avg", "exp_avg_sq")
"""AdamW's tensors of a parameter's shape; `step` is beside them."""


class Linear(LinearFunctionForZeroStage3):
    """ZeRO-3's linear layer, which keeps no weight for the backward pass; this one keeps no input either where the
    weight is frozen.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x, *others = inputs
        LinearFunctionForZeroStage3.setup_context(
            ctx, (x if ctx.needs_input_grad[1] else x.new_empty(0), *others), output
        )


class ZeroEngine:
    """DeepSpeed's engine around `module` under ZeRO stage `stage`.

    unhooked: parameters that are used without a forward, or a backward, that DeepSpeed's hooks see. borrowed: (module,
    parameter of a part of it) where the module reads the parameter itself instead of calling the part. Raises
    ConfigError if DeepSpeed refuses `config`.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
        stage: int,
        *,
        unhooked: list[nn.Parameter],
        borrowed: list[tuple[nn.Module, nn.Parameter]],
        device: torch.device,
    ) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self.optimizer, self.stage, self._unhooked = optimizer, stage, unhooked
        self._engine = _initialized(module, optimizer, config)
        if stage < 3:
            return
        # The class is looked up by name at each call. DeepSpeed keeps the inputs of frozen layers alive too, which
        # for a frozen LLM is most of the memory of its activations.
        deepspeed.runtime.zero.linear.LinearFunctionForZeroStage3 = Linear
        for owner, parameter in borrowed:
            deepspeed.zero.register_external_parameter(owner, parameter)
        for buffer in module.buffers():  # DeepSpeed places parameters alone
            buffer.data = buffer.data.to(device)
        # DeepSpeed makes these whole behind the first training step, but sample prompts come before it
        _gather(self._engine.optimizer.persistent_parameters)

    def use_scaler(self, scaler: torch.amp.GradScaler) -> None:
        """Have fp16's loss scaled by `scaler`, which starts where the recipe says and is in checkpoints.

        DeepSpeed makes one of its own, with no setting for its start, and takes no other by its configuration.
        """
        if self.stage:
            self._engine.optimizer.torch_autocast_gradscaler = scaler
        else:
            self._engine.torch_autocast_z0_gradscaler = scaler

    def forward(self, batch: Any) -> Any:
        return self._engine(batch)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of one micro-batch; DeepSpeed takes the mean over ranks."""
        if self.stage == 3:
            # behind the forward pass DeepSpeed lets go of what its hooks did not see used
            _gather(self._unhooked)
        # the loss is normalised by tokens of the whole step already, whichever micro-batch they are in
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        """Behind each backward: an update, if it was the last micro-batch."""
        self._engine.step()

    def norm(self) -> torch.Tensor:
        """Of the whole gradient of the last update, before it was clipped. Not under stage 0."""
        return torch.as_tensor(self._engine.get_global_grad_norm())

    def whole(self, p: nn.Parameter, slot: str | None = None) -> torch.Tensor:
        """A parameter, or one of its optimiser's tensors, put together from the parts of all ranks. Stage 1 to 3."""
        return safe_get_full_fp32_param(p) if slot is None else safe_get_full_optimizer_state(p, slot)

    def steps_done(self) -> torch.Tensor:
        """AdamW's counter."""
        return next(state["step"] for state in self.optimizer.state.values() if "step" in state)

    def load_state(self, named: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], rank: int) -> None:
        """Restore the optimiser's `<slot>.<name>` tensors; each rank takes its part. Stage 1 to 3."""
        zero = self._engine.optimizer
        step = next((v for k, v in tensors.items() if k.startswith("step.")), torch.zeros(1)).reshape(())
        flats = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        # Before the first step there is no state to set: it is made here as AdamW would.
        for flat in flats:
            self.optimizer.state[flat] = {"step": step.clone(), **{slot: torch.zeros_like(flat) for slot in SLOTS}}
        self.link_state()
        for name, p in named.items():
            for slot in SLOTS:
                value = tensors[f"{slot}.{name}"].to(flats[0].device)
                if self.stage == 3:
                    safe_set_local_optimizer_state(p, _part(value, p.ds_tensor.ds_numel, rank), slot)
                else:
                    safe_set_full_optimizer_state(p, value, slot)

    def link_state(self) -> None:
        """Let each parameter find its state under ZeRO-1 and 2, without which `whole` has none.

        DeepSpeed does it too early: when the first of the groups has been updated.
        """
        zero = self._engine.optimizer
        if self.stage < 3:
            for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(parameters, flat, self.optimizer.state)


def _initialized(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    try:
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    except (
        ValueError,
        TypeError,
        AssertionError,
        KeyError,
        deepspeed.runtime.zero.utils.ZeRORuntimeException,
    ) as error:
        raise ConfigError(f"DeepSpeed does not accept parallel.deepspeed: {error}") from error
    return engine


def _part(value: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    """A rank's part of a tensor that ZeRO-3 splits into parts of `size`, the last one padded."""
    flat = value.flatten()
    return F.pad(flat[size * rank : size * (rank + 1)], (0, max(0, size - max(0, flat.numel() - size * rank))))


def _gather(parameters: list[Any]) -> None:
    """Make those of ZeRO-3's `parameters` whole that are not. There is a public context that gathers, but it lets go
    again at its end, before the backward pass.
    """
    if absent := [p for p in parameters if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]:
        absent[0].all_gather(absent)
