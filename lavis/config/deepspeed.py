"""What a recipe's `parallel.deepspeed` says that other keys say too. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from lavis.config.layers import SCHEMA, label
from lavis.config.resolved import Recipe
from lavis.core.errors import ConfigError
from lavis.core.logging import warn_once

STRATEGIES = ("zero", "pipeline")
"""Strategies that read the section."""
_SHARED = {
    "train.accumulation": ("gradient_accumulation_steps", int),
    "train.micro_batch_size": ("train_micro_batch_size_per_gpu", int),
    "optim.max_grad_norm": ("gradient_clipping", float),
    "optim.lr": ("optimizer.params.lr", float),
    "optim.beta1": ("optimizer.params.betas.0", float),
    "optim.beta2": ("optimizer.params.betas.1", float),
    "optim.eps": ("optimizer.params.eps", float),
    "optim.weight_decay": ("optimizer.params.weight_decay", float),
}
"""Key of a recipe to key and type in the section."""


def with_deepspeed_section(recipe: Recipe) -> Recipe:
    """`recipe` with what its parallel.deepspeed says about keys that nothing else sets.

    Where both say something else, the recipe's own key holds and a warning names the two. Only for strategies that use
    DeepSpeed.
    """
    if recipe.parallel.strategy not in STRATEGIES:
        return recipe
    for key, name, value in shared_values(recipe.parallel.deepspeed):
        section, _, field = key.partition(".")
        own, source = getattr(getattr(recipe, section), field), recipe.origins[key]
        if own == value:
            continue
        if source == SCHEMA:
            changed = dataclasses.replace(getattr(recipe, section), **{field: value})
            recipe = dataclasses.replace(recipe, **{section: changed})
            recipe.origins[key] = f"{label(recipe.source)}: parallel.deepspeed.{name}"
        else:
            warn_once(f"{key} is {own} ({source}) but parallel.deepspeed.{name} says {value}: {own} is used.")
    return recipe


def shared_values(section: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(key of a recipe, key in the section, value) of all that `section` sets; `auto` sets nothing.

    Raises ConfigError for what is no number.
    """
    for key, (name, kind) in _SHARED.items():
        value = _at(section, name)
        if value in (None, "auto"):
            continue
        try:
            yield key, name, kind(value)
        except (TypeError, ValueError) as error:
            at = f"parallel.deepspeed.{name}"
            raise ConfigError(f"{at} is {value!r}: give a number, or leave it to {key}.") from error
    for dtype in ("fp16", "bf16"):
        enabled = _at(section, f"{dtype}.enabled")
        if enabled not in (None, "auto", False):
            yield "train.autocast_dtype", f"{dtype}.enabled", dtype


def _at(section: Any, name: str) -> Any:
    for part in name.split("."):
        if isinstance(section, Mapping):
            section = section.get(part)
        elif isinstance(section, list) and part.isdigit() and int(part) < len(section):
            section = section[int(part)]
        else:
            return None
    return section
