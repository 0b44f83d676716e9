"""Combinations of recipe values that can't work. Each rule yields messages that say how to fix it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lavis.config import data_rules
from lavis.config.deepspeed import STRATEGIES
from lavis.config.init import Init
from lavis.core.registries import MODEL_CONFIGS

if TYPE_CHECKING:
    from lavis.config.resolved import Recipe


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
    if recipe.data.cache_features is not True:
        return
    if not model.sees or model.row_format != "chat":
        yield "data.cache_features needs a model that sees and answers: set it to false."
        return
    if changing := ", ".join(model.changing()):
        yield f"data.cache_features needs a frozen image encoder; yours is trained ({changing}): set it to false."


def _sizes(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    model: Any = recipe.model
    if model.row_format == "chat" and data.packing and data.pack_length < model.max_length:
        longest = f"the longest sample, model.max_length {model.max_length}"
        yield f"data.pack_length {data.pack_length} is shorter than {longest}: raise the one or lower the other."
    budget: Any = recipe.train.micro_batch_tokens
    if budget not in ("auto", None) and not (type(budget) is int and budget > 0):
        yield f"train.micro_batch_tokens is {budget!r}: give a number of tokens, auto or null."
        return
    budget = None if budget == "auto" else budget
    if budget and model.row_format == "chat":
        length = data.pack_length if data.packing else model.max_length
        if budget < length:
            yield f"train.micro_batch_tokens {budget} is less than a row of {length} tokens: raise it to that at least."
    if budget and recipe.parallel.strategy != "data_parallel":
        yield (
            f"train.micro_batch_tokens does not go with parallel.strategy {recipe.parallel.strategy}, whose steps have"
            " a fixed number of micro-batches: set it to null."
        )
    if recipe.train.autocast_on_cpu and recipe.train.autocast_dtype == "fp16" and recipe.run.device != "cuda":
        yield "train.autocast_dtype fp16 does not work on the CPU: use bf16, or train.autocast_on_cpu=false."
    if recipe.optim.min_lr > recipe.optim.lr and recipe.optim.schedule != "constant_lr" and not recipe.run.evaluate:
        yield f"optim.min_lr {recipe.optim.min_lr:g} is above optim.lr {recipe.optim.lr:g}: the rate would grow."


def _objective(recipe: Recipe) -> Iterator[str]:
    yield from recipe.objective.problems()
    model, name = recipe.model, recipe.objective.name
    built_in = {name for arch in MODEL_CONFIGS.list() for name in MODEL_CONFIGS.get(arch).objectives}
    if name not in model.objectives and name in built_in:  # of a user's own objective nothing is known here
        fix = f"set objective.name={model.objectives[0]}"
        yield f"objective.name {name!r} does not train model.arch {model.arch!r}: {fix}."


def _deepspeed(recipe: Recipe) -> Iterator[str]:
    if recipe.parallel.strategy not in STRATEGIES:
        return
    key = "parallel.deepspeed.zero_optimization.stage"
    zero = recipe.parallel.deepspeed.get("zero_optimization") or {}
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else None
    if stage not in (0, 1, 2, 3):
        yield f"{key} is {stage!r}: it is 0, 1, 2 or 3."
    if stage in (1, 2, 3) and recipe.optim.name != "adamw":
        yield (
            f"optim.name {recipe.optim.name} does not go with ZeRO-{stage}, whose ranks each have a part of AdamW's"
            f" state: set it to adamw, or {key}=0."
        )
    quantization = getattr(getattr(recipe.model, "llm", None), "quantization", None)
    if stage == 3 and quantization:
        yield (
            f"model.llm.quantization {quantization} does not go with ZeRO-3, which splits weights: set"
            f" it to null, or {key}=2."
        )
    if recipe.parallel.strategy == "pipeline":
        yield from _pipeline(recipe, stage)
    if stage == 3 and recipe.export.path:
        yield (
            "export.path needs whole weights, which no rank has under ZeRO-3: set it to null and use `lavis export`, or"
            f" {key}=2."
        )


def _pipeline(recipe: Recipe, stage: Any) -> Iterator[str]:
    model: Any = recipe.model
    if not model.splits:
        yield f"parallel.strategy pipeline cuts an LLM, which {model.arch} has not: set it to data_parallel."
        return
    if stage:
        yield (
            f"parallel.deepspeed.zero_optimization.stage is {stage}: a pipeline keeps each stage's optimiser whole."
            " Set it to 0."
        )
    if model.llm.quantization:
        yield (
            f"model.llm.quantization {model.llm.quantization} does not go with a pipeline: set it to null, or"
            " parallel.strategy=data_parallel."
        )
    if recipe.export.path:
        yield (
            "export.path needs the whole model, which no rank of a pipeline has: set it to null and use `lavis export`."
        )
    if recipe.train.amp and model.enable_autocast and recipe.train.autocast_dtype == "fp16":
        yield "train.autocast_dtype fp16 needs a loss scale, which the pipeline has none of: use bf16."


RULES = (
    _objective,
    _model,
    _chat_only,
    _frozen_weights,
    _init,
    _feature_cache,
    _sizes,
    _deepspeed,
    *data_rules.RULES,
)
