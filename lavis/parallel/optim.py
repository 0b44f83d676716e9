"""The optimiser over the trainable parameters, and its state as plain named tensors."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import nn

from lavis.config.sections import OptimConfig
from lavis.core.errors import CheckpointError, ConfigError
from lavis.core.registries import OPTIMIZERS


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


def build_optimizer(model: nn.Module, optim: OptimConfig, *, fused: bool = False) -> torch.optim.Optimizer:
    """The optimiser that the recipe names, with no weight decay on 1-D tensors and a per-group `lr_scale`: a part's
    own, times the tower's layer-wise decay.

    fused: whether one kernel may update all parameters, which have to stay where they are.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    scales = _rate_scales(model, optim.layer_decay)
    for p in trainable_parameters(model).values():
        decay = 0.0 if p.ndim <= 1 else optim.weight_decay
        groups.setdefault((decay, scales.get(p, 1.0)), []).append(p)
    made = [{"params": ps, "weight_decay": decay, "lr_scale": scale} for (decay, scale), ps in groups.items()]
    return OPTIMIZERS.get(optim.name)(model, made, optim, fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's rate to `rate` times its lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The optimiser's state as `<slot>.<parameter name>` tensors, independent of group order."""
    names: dict[torch.Tensor, str] = {p: name for name, p in trainable_parameters(model).items()}
    tensors: dict[str, torch.Tensor] = {}
    for p, slots in optimizer.state.items():
        for slot, value in slots.items():
            tensor = torch.as_tensor(value, dtype=torch.float32) if slot == "step" else value
            tensors[f"{slot}.{names[p]}"] = tensor if tensor.ndim else tensor.reshape(1)
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, torch.Tensor]
) -> None:
    """Restore what `optimizer_tensors` gave. Raises CheckpointError when it belongs to other parameters."""
    names = trainable_parameters(model)
    fused = {p for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    for key, value in tensors.items():
        slot, name = key.split(".", 1)
        if name not in names:
            raise CheckpointError(f"the checkpoint holds optimiser state of {name}, which is not trained now.")
        p = names[name]
        if slot != "step":
            optimizer.state[p][slot] = value.to(p.device, copy=True)
        elif type(optimizer).__module__.startswith("bitsandbytes"):
            optimizer.state[p][slot] = int(value)
        else:  # AdamW keeps its counter on the CPU unless it is fused
            optimizer.state[p][slot] = value.reshape(()).to(p.device if p in fused else "cpu", copy=True)


def _rate_scales(model: nn.Module, layer_decay: float) -> dict[nn.Parameter, float]:
    """Parameter to the factor on its learning rate, as the parts of `model` say; the others have 1."""
    scales: dict[nn.Parameter, float] = {}
    for module in model.modules():
        if isinstance(module, HasRates):
            scales |= module.rate_scales(layer_decay)
    return scales
