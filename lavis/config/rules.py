"""Combinations of recipe values that can't work. Each rule yields messages that name the mend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lavis.config.deepspeed import DEEPSPEED_RUNNERS
from lavis.config.schema import as_list
from lavis.core.registries import MODEL_CONFIGS
from lavis.models.parts import Init

if TYPE_CHECKING:
    from lavis.config.recipe import Recipe

RANDOM_PROCESSORS = frozenset({"blip2_image_train"})
"""Image processors that give another tensor each time (random crops)."""


def generates_itself(dataset: str) -> bool:
    """Whether the dataset of that name makes its own files (the shapes world)."""
    return dataset.startswith("shapes_")


def _model(recipe: Recipe) -> Iterator[str]:
    yield from recipe.model.problems()
    if not recipe.model.trained and not recipe.run.evaluate:
        yield "nothing would be trained, everything is frozen: set model.connector.train=full, or run.evaluate=true."


def _image_size(recipe: Recipe) -> Iterator[str]:
    tower = getattr(recipe.model, "tower", None)
    for name, dataset in recipe.datasets.items() if tower else ():
        for kind in ("train", "eval") if dataset.data_type != "text" else ():
            size = getattr(dataset.vis_processor, kind).image_size
            if size != tower.image_size:
                key = f"datasets.{name}.vis_processor.{kind}.image_size"
                yield f"{key} is {size} but model.tower.image_size is {tower.image_size}: set both to the same."


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
    if not recipe.run.cache_features:
        return
    if not model.sees or model.row_format != "chat":
        yield "run.cache_features needs a model that sees and answers: set it to false."
        return
    if changing := ", ".join(model.changing()):
        yield (f"run.cache_features needs a frozen image encoder; yours is trained ({changing}): set it to false.")
    for name, dataset in recipe.datasets.items():
        processor = dataset.vis_processor.train.name
        if (
            dataset.data_type != "text"
            and processor not in RANDOM_PROCESSORS
            and dataset.vis_processor.train != dataset.vis_processor.eval
        ):
            yield (
                f"run.cache_features keeps one view, but datasets.{name}.vis_processor.train and .eval differ: make"
                " them the same."
            )
        if dataset.data_type != "text" and processor in RANDOM_PROCESSORS:
            key = f"datasets.{name}.vis_processor.train.name"
            yield f"run.cache_features keeps one view, but {key} {processor} crops at random: use blip2_image_eval."


def _sizes(recipe: Recipe) -> Iterator[str]:
    run, model = recipe.run, recipe.model
    if model.row_format == "chat" and run.packing and run.pack_length < model.max_length:
        longest = f"the longest sample, model.max_length {model.max_length}"
        yield f"run.pack_length {run.pack_length} is shorter than {longest}: raise the one or lower the other."
    if run.autocast_on_cpu and run.autocast_dtype == "fp16" and run.device != "cuda":
        yield "run.autocast_dtype fp16 does not work on the CPU: use bf16, or run.autocast_on_cpu=false."
    if run.min_lr > run.init_lr and run.lr_sched != "constant_lr" and not run.evaluate:
        yield f"run.min_lr {run.min_lr:g} is above run.init_lr {run.init_lr:g}: the rate would grow."


def _dataset_names(recipe: Recipe) -> Iterator[str]:
    run, datasets = recipe.run, recipe.datasets
    unknown = sorted(set(run.train_dataset_ratios) - set(datasets))
    if unknown:
        yield f"run.train_dataset_ratios names {', '.join(unknown)}, not among the datasets: {', '.join(datasets)}."
    if not run.evaluate and not run.train_splits:
        yield "run.train_splits is empty: name a split to train on, or set run.evaluate=true."
    if run.evaluate and not (run.test_splits or run.valid_splits):
        yield "run.evaluate is true but there is nothing to evaluate on: name run.test_splits or run.valid_splits."
    if any(generates_itself(name) for name in datasets):
        return  # their splits are known to the data layer alone
    known = {split for d in datasets.values() for split in d.build_info.annotations}
    used: dict[str, Any] = {"test_splits": run.test_splits}
    if not run.evaluate:
        used |= {"train_splits": run.train_splits, "valid_splits": run.valid_splits}
    for key, splits in used.items():
        for split in sorted(set(splits) - known):
            names = ", ".join(sorted(known)) or "none"
            yield f"run.{key}: no dataset has annotations for the split {split!r} (known: {names})."


def _annotation_addresses(recipe: Recipe) -> Iterator[str]:
    for name, dataset in recipe.datasets.items():
        for split, source in dataset.build_info.annotations.items():
            key, files = f"datasets.{name}.build_info.annotations.{split}", len(as_list(source.storage))
            for field in ("url", "sha256"):
                given = len(as_list(getattr(source, field)))
                if given not in (0, files):
                    yield f"{key}.{field} has {given} for the {files} of {key}.storage: give one for each file."


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
    for name, dataset in recipe.datasets.items():
        if model.row_format not in (None, dataset.sample_format):
            yield (
                f"datasets.{name}.sample_format is {dataset.sample_format}, but model.arch {model.arch!r} takes"
                f" {model.row_format}."
            )
        if model.row_format == "chat" and not model.sees and dataset.data_type != "text":
            yield f"datasets.{name}.data_type is images, but the model has no tower: set it to text, or give a tower."
    if model.row_format == "caption" and run.packing:
        yield (
            f"run.packing does not go with {model.arch}, which compares images with captions row by row: set it to"
            " false."
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
    run, model = recipe.run, recipe.model
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
    _image_size,
    _chat_only,
    _frozen_weights,
    _init,
    _feature_cache,
    _sizes,
    _dataset_names,
    _annotation_addresses,
    _deepspeed,
)
