"""Combinations of recipe values that can't work. Each rule yields messages that name the mend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lavis.config import data_rules
from lavis.config.deepspeed import DEEPSPEED_RUNNERS
from lavis.models.configs import CausalLMConfig, MiniGPT4QwenConfig, VisionConfig

if TYPE_CHECKING:
    from lavis.config.recipe import Recipe


def _vision_dimensions(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if not isinstance(model, VisionConfig):
        return
    vit = model.vit_dimensions()
    patch, width, heads = vit["patch_size"], vit["embed_dim"], vit["num_heads"]
    if model.image_size % patch:
        yield f"model.image_size {model.image_size} is not a multiple of the patch size {patch} (model.vit.patch_size)."
    if width % heads:
        yield f"model.vit: width {width} (embed_dim) can't be split over {heads} heads (num_heads): choose a divisor."
    q = model.qformer
    if q.hidden_size % q.num_attention_heads:
        heads = q.num_attention_heads
        yield f"model.qformer: hidden_size {q.hidden_size} can't be split over {heads} heads (num_attention_heads)."


def _something_to_train(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if not isinstance(model, MiniGPT4QwenConfig):
        return
    frozen = all((model.freeze_vit, model.freeze_qformer, model.freeze_queries, model.freeze_llm, model.freeze_proj))
    if frozen and not (model.unfreeze_pos_embed or model.get_lora or recipe.run.evaluate):
        yield "nothing would be trained, everything is frozen: set model.freeze_proj=false, or run.evaluate=true."
    if model.llm_quantization and not model.freeze_llm:
        yield (
            f"model.llm_quantization {model.llm_quantization} keeps the LLM's weights in integers, which can't be"
            " trained: set model.freeze_llm=true."
        )
    if model.llm_device_map and not recipe.run.evaluate:
        yield (
            f"model.llm_device_map {model.llm_device_map} is for chat and evaluation: set it to null; training splits"
            " an LLM with the pipeline."
        )
    if model.get_lora and not model.lora_parts:
        yield "model.get_lora needs a part to adapt: name llm, vit or qformer in model.lora_parts."
    for part in model.lora_parts if model.get_lora else ():
        if not getattr(model, f"freeze_{part}") or (part == "vit" and model.unfreeze_pos_embed):
            yield (
                f"model.get_lora adapts a frozen {part}, but model.freeze_{part} is false (or a part of it is trained):"
                " choose one of the two."
            )
    if not (model.pretrained or model.load_finetuned) and model.freeze_vit and model.freeze_qformer:
        yield (
            "the vision tower is frozen but has no weights: name model.pretrained, or train it (model.freeze_vit=false,"
            " model.freeze_qformer=false)."
        )


def _feature_cache(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if not recipe.data.cache_features:
        return
    if not isinstance(model, MiniGPT4QwenConfig):
        yield f"data.cache_features needs the arch minigpt4qwen, not {model.arch}: set it to false."
        return
    thawed = [k for k in ("freeze_vit", "freeze_qformer", "freeze_queries") if not getattr(model, k)]
    thawed += ["unfreeze_pos_embed"] if model.unfreeze_pos_embed else []
    adapted = [p for p in ("vit", "qformer") if model.get_lora and p in model.lora_parts]
    if thawed or adapted:
        trained = [f"model.{k}={str(getattr(model, k)).lower()}" for k in thawed] + [f"LoRA on {p}" for p in adapted]
        yield (
            f"data.cache_features needs a frozen image encoder; yours is trained ({', '.join(trained)}): set it to"
            " false."
        )


def _sizes(recipe: Recipe) -> Iterator[str]:
    run, data, model = recipe.run, recipe.data, recipe.model
    if (
        isinstance(model, (MiniGPT4QwenConfig, CausalLMConfig))
        and data.packing
        and data.pack_length < model.max_txt_len
    ):
        longest = f"the longest sample, model.max_txt_len {model.max_txt_len}"
        yield f"data.pack_length {data.pack_length} is shorter than {longest}: raise the one or lower the other."
    if run.autocast_on_cpu and run.autocast_dtype == "fp16" and run.device != "cuda":
        yield "run.autocast_dtype fp16 does not work on the CPU: use bf16, or run.autocast_on_cpu=false."
    if run.min_lr > run.init_lr and run.lr_sched != "constant_lr" and not run.evaluate:
        yield f"run.min_lr {run.min_lr:g} is above run.init_lr {run.init_lr:g}: the rate would grow."


TASKS_OF_ARCH = {
    "minigpt4qwen": ("image_text_pretrain", "deepspeed_image_text_pretrain"),
    "blip2_qformer": ("blip2_stage1",),
    "causal_lm": ("language_modeling",),
    "byte_level_bpe": ("tokenizer_training",),
}


def _task(recipe: Recipe) -> Iterator[str]:
    run, arch = recipe.run, recipe.model.arch
    tasks = TASKS_OF_ARCH.get(arch, (run.task,))
    if run.task not in tasks:
        yield f"run.task {run.task!r} does not train model.arch {arch!r}: set run.task={tasks[0]}."
    if (arch == "byte_level_bpe") != (run.runner == "tokenizer_runner"):
        yield (
            f"run.runner {run.runner!r} does not go with model.arch {arch!r}: tokenizer_runner is for byte_level_bpe,"
            " and for nothing else."
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
    quantization = getattr(recipe.model, "llm_quantization", None)
    if stage == 3 and quantization:
        yield (
            f"model.llm_quantization {quantization} does not go with ZeRO-3, which splits weights: set"
            f" it to null, or {key}=2."
        )
    if run.runner == "pipeline_runner":
        yield from _pipeline(recipe, stage)
    if stage == 3 and run.export:
        yield (
            "run.export needs whole weights, which no rank has under ZeRO-3: set it to null and use `lavis export`, or"
            f" {key}=2."
        )


def _pipeline(recipe: Recipe, stage: Any) -> Iterator[str]:
    run, model = recipe.run, recipe.model
    if not isinstance(model, MiniGPT4QwenConfig):
        yield (
            f"run.runner pipeline_runner cuts the LLM of a minigpt4qwen, but model.arch is {model.arch}: set"
            " run.runner=runner_base."
        )
        return
    if stage:
        yield (
            f"run.deepspeed_config.zero_optimization.stage is {stage}: a pipeline keeps each stage's optimiser whole."
            " Set it to 0."
        )
    if model.llm_quantization:
        yield (
            f"model.llm_quantization {model.llm_quantization} does not go with a pipeline: set it to null, or"
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
    _vision_dimensions,
    _something_to_train,
    _feature_cache,
    _sizes,
    _deepspeed,
    *data_rules.RULES,
)
