"""What a recipe's `run.deepspeed_config` says that other keys of `run` say too. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lavis.core.errors import ConfigError

DEEPSPEED_RUNNERS = ("deepspeed_runner", "pipeline_runner", "zero", "pipeline")
"""Runners that read the section."""
_SHARED = {
    "accum_grad_iters": ("gradient_accumulation_steps", int),
    "batch_size_train": ("train_micro_batch_size_per_gpu", int),
    "grad_norm_clip": ("gradient_clipping", float),
    "init_lr": ("optimizer.params.lr", float),
    "beta1": ("optimizer.params.betas.0", float),
    "beta2": ("optimizer.params.betas.1", float),
    "adam_eps": ("optimizer.params.eps", float),
    "weight_decay": ("optimizer.params.weight_decay", float),
}
"""Key of `run` to key and type in the section."""


def shared_values(section: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(key of `run`, key in the section, value) of all that `section` sets; `auto` sets nothing.

    Raises ConfigError for what is no number.
    """
    for key, (name, kind) in _SHARED.items():
        value = _at(section, name)
        if value in (None, "auto"):
            continue
        try:
            yield key, name, kind(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"run.deepspeed_config.{name} is {value!r}: give a number, or leave it to run.{key}."
            ) from error
    for dtype in ("fp16", "bf16"):
        enabled = _at(section, f"{dtype}.enabled")
        if enabled not in (None, "auto", False):
            yield "autocast_dtype", f"{dtype}.enabled", dtype


def _at(section: Any, name: str) -> Any:
    for part in name.split("."):
        if isinstance(section, Mapping):
            section = section.get(part)
        elif isinstance(section, list) and part.isdigit() and int(part) < len(section):
            section = section[int(part)]
        else:
            return None
    return section
