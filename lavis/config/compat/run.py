"""Older spellings of the `run` part of a recipe: one flat section of LAVIS's and MiniGPT4Qwen's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lavis.config.compat.outcome import Outcome, Wrong
from lavis.core.errors import did_you_mean
from lavis.core.registries import OBJECTIVES, STRATEGIES
from lavis.core.registry import Registry

_SECTIONS = {
    "optim": {
        "lr_sched": "schedule",
        "init_lr": "lr",
        "min_lr": "min_lr",
        "warmup_lr": "warmup_lr",
        "warmup_steps": "warmup_steps",
        "warmup_ratio": "warmup_ratio",
        "lr_decay_rate": "lr_decay_rate",
        "lr_layer_decay": "layer_decay",
        "weight_decay": "weight_decay",
        "beta1": "beta1",
        "beta2": "beta2",
        "adam_eps": "eps",
        "grad_norm_clip": "max_grad_norm",
    },
    "train": {
        "max_epoch": "epochs",
        "max_steps": "max_steps",
        "batch_size_train": "micro_batch_size",
        "accum_grad_iters": "accumulation",
        "global_batch_size": "global_batch_size",
        "amp": "amp",
        "autocast_dtype": "autocast_dtype",
        "autocast_on_cpu": "autocast_on_cpu",
        "loss_scale": "loss_scale",
    },
    "parallel": {"num_stages": "num_stages", "stage_blocks": "stage_blocks", "deepspeed_config": "deepspeed"},
    "eval": {
        "batch_size_eval": "batch_size",
        "eval_freq": "every",
        "evaluate_before": "before",
        "evaluate_blind": "blind",
        "max_eval_samples": "max_samples",
        "max_new_tokens": "max_new_tokens",
        "sample_prompts": "prompts",
        "num_sample_prompts": "num_prompts",
    },
    "log": {"log_freq": "every", "trackers": "trackers"},
    "checkpoint": {"save_freq": "every", "keep_checkpoints": "keep"},
    "export": {"export": "path", "export_dtype": "dtype"},
}
RENAMES: dict[str, str] = {
    f"run.{old}": f"{section}.{new}" for section, names in _SECTIONS.items() for old, new in names.items()
}
"""Old dotted key to new one, value unchanged."""
VALUES: dict[str, dict[Any, Any]] = {
    "run.autocast_dtype": {"bfloat16": "bf16", "float16": "fp16"},
    "run.loss_scale": {True: None, False: None},  # the original's switch; here fp16 scales and bf16 does not
}
"""Old dotted key to what its older values are called now."""
UNUSED = dict.fromkeys(("run.world_size", "run.dist_url", "run.distributed"), "torchrun's environment decides")
"""Old dotted keys that say nothing any more, and why."""
CONSUMED: tuple[str, ...] = (
    *("run.task", "run.runner", "run.resume_ckpt_path", "run.resume_ckpt_load_dir", "run.resume_ckpt_tag"),
    *UNUSED,
)
"""Old dotted keys that `rules` reads; they are removed afterwards."""
REFERENCES = {"run.task": "objective.name", "run.runner": "parallel.strategy"}
"""Consumed keys that `${...}` can go on referring to."""

TASKS = {
    "image_text_pretrain": "sft",
    "deepspeed_image_text_pretrain": "sft",
    "language_modeling": "sft",
}
RUNNERS = {
    "runner_base": "data_parallel",
    "deepspeed_runner": "zero",
    "pipeline_runner": "pipeline",
    "tokenizer_runner": "data_parallel",
}


def rules(values: Mapping[str, Any]) -> Iterator[Outcome]:
    """(new key, value, old keys it follows from) of what more than one old key says, from the merged layers."""
    run = values.get("run")
    if not isinstance(run, Mapping):
        return
    task, runner = run.get("task"), run.get("runner")
    if task is not None:
        yield _renamed("task", task, TASKS, OBJECTIVES, "objective.name")
    if runner is not None:
        yield _renamed("runner", runner, RUNNERS, STRATEGIES, "parallel.strategy")
    if runner == "tokenizer_runner" and task != "tokenizer_training":
        yield Wrong("run.runner", "tokenizer_runner is for byte_level_bpe, and for nothing else: leave it out")
    yield from _resume(run)


def _renamed(key: str, value: Any, names: Mapping[str, str], registry: Registry[Any], new: str) -> Outcome:
    name = names.get(value, value) if isinstance(value, str) else value
    if name in registry:
        return new, name, (f"run.{key}",)
    known = sorted({*names, *registry.list()})
    return Wrong(
        f"run.{key}", f"unknown {key} {value!r}.{did_you_mean(str(value), known)} Known: {', '.join(registry.list())}"
    )


def _resume(run: Mapping[str, Any]) -> Iterator[Outcome]:
    """The original's ways to name a checkpoint; they went before `run.resume`."""
    folder = run.get("resume_ckpt_load_dir")
    if path := run.get("resume_ckpt_path"):
        yield "run.resume", path, ("run.resume_ckpt_path",)
    elif folder:
        parts = str(Path(folder, run.get("resume_ckpt_tag") or ""))
        yield "run.resume", parts, ("run.resume_ckpt_load_dir", "run.resume_ckpt_tag")
