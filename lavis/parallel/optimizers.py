"""Optimisers by name. Each makes one of parameter groups, whose `weight_decay` is said by the group."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lavis.config.sections import OptimConfig
from lavis.core.errors import ConfigError
from lavis.core.registries import OPTIMIZERS

Groups = list[dict[str, Any]]


@OPTIMIZERS.register("adamw")
def adamw(model: nn.Module, groups: Groups, optim: OptimConfig, fused: bool) -> torch.optim.Optimizer:
    """torch's AdamW; `fused` in one kernel, whose rounding is its own."""
    return torch.optim.AdamW(
        groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True if fused else None
    )


@OPTIMIZERS.register("adamw_8bit")
def adamw_8bit(model: nn.Module, groups: Groups, optim: OptimConfig, fused: bool) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW, with 8-bit moments of large tensors. Raises ConfigError if it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("optim.name adamw_8bit needs bitsandbytes: pip install 'lavis[quant]', or set it to adamw.")
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)


@OPTIMIZERS.register("lion")
def lion(model: nn.Module, groups: Groups, optim: OptimConfig, fused: bool) -> torch.optim.Optimizer:
    """Chen et al. 2023: the sign of a momentum, which is all its state."""
    return Lion(groups, {"lr": optim.lr, "betas": (optim.beta1, optim.beta2)})


@OPTIMIZERS.register("muon")
def muon(model: nn.Module, groups: Groups, optim: OptimConfig, fused: bool) -> torch.optim.Optimizer:
    """torch's Muon, of updates as large as AdamW's, for matrices; AdamW for all else, tables and heads among it."""
    tables = {p for module in _tables(model) for p in module.parameters()}
    split: tuple[Groups, Groups] = ([], [])
    for group in groups:
        for matrices, part in enumerate(split):
            if own := [p for p in group["params"] if (p.ndim == 2 and p not in tables) == bool(matrices)]:
                part.append({**group, "params": own})
    rest, weights = split
    parts = [adamw(model, rest, optim, fused)] if rest else []
    if weights:
        parts.append(torch.optim.Muon(weights, lr=optim.lr, adjust_lr_fn="match_rms_adamw"))
    return Joined(parts)


def _tables(model: nn.Module) -> Iterator[nn.Module]:
    """Embeddings, and the heads of LLMs."""
    module: Any
    for module in model.modules():
        head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
        yield from [head] if head is not None else []
        if isinstance(module, nn.Embedding):
            yield module


class Joined(torch.optim.Optimizer):
    """Several optimisers of different parameters as one."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()


class Lion(torch.optim.Optimizer):
    """See `lion`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            momenta = [self.state[p].setdefault("exp_avg", torch.zeros_like(p)) for p in params]
            rate, (mixed, kept) = group["lr"], group["betas"]
            updates = torch._foreach_lerp(momenta, grads, 1 - mixed)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-rate)
            torch._foreach_lerp_(momenta, grads, 1 - kept)
