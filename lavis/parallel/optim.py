"""AdamW over the trainable parameters, and its state as plain named tensors."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import nn

from lavis.config.sections import OptimConfig
from lavis.core.errors import CheckpointError, ConfigError


@runtime_checkable
class HasRates(Protocol):
    """A module that says how fast its parameters learn."""

    def rate_scales(self, layer_decay: float) -> dict[nn.Parameter, float]:
        """Parameter to the factor on its learning rate; `layer_decay`: per layer, from the top of a tower down."""


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter of all that is trained. Raises ConfigError when nothing is."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ConfigError("every part of the model is frozen: set model.connector.train=full or model.llm.train=lora.")
    return named


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW with no weight decay on 1-D tensors and a per-group `lr_scale`: a part's own, times the tower's layer-wise
    decay.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    scales = _rate_scales(model, optim.layer_decay)
    for p in trainable_parameters(model).values():
        decay = 0.0 if p.ndim <= 1 else optim.weight_decay
        groups.setdefault((decay, scales.get(p, 1.0)), []).append(p)
    return torch.optim.AdamW(
        [{"params": ps, "weight_decay": decay, "lr_scale": scale} for (decay, scale), ps in groups.items()],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's rate to `rate` times its lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The optimiser's state as `<slot>.<parameter name>` tensors, independent of group order."""
    names: dict[torch.Tensor, str] = {p: name for name, p in trainable_parameters(model).items()}
    return {
        f"{slot}.{names[p]}": value if value.ndim else value.reshape(1)
        for p, slots in optimizer.state.items()
        for slot, value in slots.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, torch.Tensor]
) -> None:
    """Restore what `optimizer_tensors` gave. Raises CheckpointError when it belongs to other parameters."""
    names = trainable_parameters(model)
    for key, value in tensors.items():
        slot, name = key.split(".", 1)
        if name not in names:
            raise CheckpointError(f"the checkpoint holds optimiser state of {name}, which is not trained now.")
        p = names[name]
        # AdamW keeps its step counter on the CPU and everything else beside the parameter
        state = value.reshape(()).clone() if slot == "step" else value.to(p.device, copy=True)
        optimizer.state[p][slot] = state


def _rate_scales(model: nn.Module, layer_decay: float) -> dict[nn.Parameter, float]:
    """Parameter to the factor on its learning rate, as the parts of `model` say; the others have 1."""
    scales: dict[nn.Parameter, float] = {}
    for module in model.modules():
        if isinstance(module, HasRates):
            scales |= module.rate_scales(layer_decay)
    return scales
