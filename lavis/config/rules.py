"""Combinations of recipe values that can't work. Each rule yields messages that name the mend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lavis.config import data_rules
from lavis.config.deepspeed import DEEPSPEED_RUNNERS
from lavis.config.init import Init
from lavis.core.registries import MODEL_CONFIGS

if TYPE_CHECKING:
    from lavis.config.recipe import Recipe


def _model(recipe: Recipe) -> Iterator[str]:
    yield from recipe.model.problems()
    if not recipe.model.trained and not recipe.run.evaluate:
        yield "nothing would be trained, everything is frozen: set model.connector.train=full, or run.evaluate=true."


def _chat_only(recipe: Recipe) -> Iterator[str]:
    llm = getattr(recipe.model, "llm", None)
    if llm and llm.device_map and not recipe.run.evaluate:
        yield (
            f"model.llm.device_map {llm.device_map} is for chat and evaluation: set it to null; training splits an LLM"
            " with the pipeline."
        )


def _frozen_weights(recipe: Recipe) -> Iterator[str]:
    tower = getattr(recipe.model, "tower", None)
    started = {part for item in recipe.init for part in item.get("parts") or ["tower"]}
    if tower and not (tower.weights or "tower" in started or any(recipe.model.changing())):
        yield (
            "the vision tower is frozen but has no weights: name model.tower.weights, start it from a run with `init`,"
            " or train it (model.tower.train=full)."
        )


def _init(recipe: Recipe) -> Iterator[str]:
    for i, values in enumerate(recipe.init):
        yield from Init.read(values, f"init.{i}")[1]


def _feature_cache(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if not recipe.data.cache_features:
        return
    if not model.sees or model.row_format != "chat":
        yield "data.cache_features needs a model that sees and answers: set it to false."
        return
    if changing := ", ".join(model.changing()):
        yield f"data.cache_features needs a frozen image encoder; yours is trained ({changing}): set it to false."


def _sizes(recipe: Recipe) -> Iterator[str]:
    run, data = recipe.run, recipe.data
    model: Any = recipe.model
    if model.row_format == "chat" and data.packing and data.pack_length < model.max_length:
        longest = f"the longest sample, model.max_length {model.max_length}"
        yield f"data.pack_length {data.pack_length} is shorter than {longest}: raise the one or lower the other."
    if run.autocast_on_cpu and run.autocast_dtype == "fp16" and run.device != "cuda":
        yield "run.autocast_dtype fp16 does not work on the CPU: use bf16, or run.autocast_on_cpu=false."
    if run.min_lr > run.init_lr and run.lr_sched != "constant_lr" and not run.evaluate:
        yield f"run.min_lr {run.min_lr:g} is above run.init_lr {run.init_lr:g}: the rate would grow."


def _task(recipe: Recipe) -> Iterator[str]:
    run, model = recipe.run, recipe.model
    built_in = {task for arch in MODEL_CONFIGS.list() for task in MODEL_CONFIGS.get(arch).tasks}
    if run.task not in model.tasks and run.task in built_in:  # of a user's own objective nothing is known here
        yield f"run.task {run.task!r} does not train model.arch {model.arch!r}: set run.task={model.tasks[0]}."
    if (model.row_format is None) != (run.runner == "tokenizer_runner"):
        yield (
            f"run.runner {run.runner!r} does not go with model.arch {model.arch!r}: tokenizer_runner is for"
            " byte_level_bpe, and for nothing else."
        )


def _deepspeed(recipe: Recipe) -> Iterator[str]:
    run = recipe.run
    if run.runner not in DEEPSPEED_RUNNERS:
        return
    key = "run.deepspeed_config.zero_optimization.stage"
    zero = run.deepspeed_config.get("zero_optimization") or {}
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else None
    if stage not in (0, 1, 2, 3):
        yield f"{key} is {stage!r}: it is 0, 1, 2 or 3."
    quantization = getattr(getattr(recipe.model, "llm", None), "quantization", None)
    if stage == 3 and quantization:
        yield (
            f"model.llm.quantization {quantization} does not go with ZeRO-3, which splits weights: set"
            f" it to null, or {key}=2."
        )
    if run.runner in ("pipeline_runner", "pipeline"):
        yield from _pipeline(recipe, stage)
    if stage == 3 and run.export:
        yield (
            "run.export needs whole weights, which no rank has under ZeRO-3: set it to null and use `lavis export`, or"
            f" {key}=2."
        )


def _pipeline(recipe: Recipe, stage: Any) -> Iterator[str]:
    run = recipe.run
    model: Any = recipe.model
    if not model.splits:
        yield f"run.runner pipeline_runner cuts an LLM, which {model.arch} has not: set run.runner=runner_base."
        return
    if stage:
        yield (
            f"run.deepspeed_config.zero_optimization.stage is {stage}: a pipeline keeps each stage's optimiser whole."
            " Set it to 0."
        )
    if model.llm.quantization:
        yield (
            f"model.llm.quantization {model.llm.quantization} does not go with a pipeline: set it to null, or"
            " run.runner=runner_base."
        )
    if run.export:
        yield (
            "run.export needs the whole model, which no rank of a pipeline has: set it to null and use `lavis export`."
        )
    if run.amp and model.enable_autocast and run.autocast_dtype == "fp16":
        yield "run.autocast_dtype fp16 needs a loss scale, which the pipeline has none of: use bf16."


RULES = (
    _task,
    _model,
    _chat_only,
    _frozen_weights,
    _init,
    _feature_cache,
    _sizes,
    _deepspeed,
    *data_rules.RULES,
)
