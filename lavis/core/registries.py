"""The registries of the program, with the modules that fill them. Importing this imports no model."""

from __future__ import annotations

from typing import Any

from lavis.core.registry import Registry

MODELS: Registry[Any] = Registry(
    "model",
    lazy={
        "minigpt4qwen": "lavis.models.minigpt4qwen",
        "blip2_qformer": "lavis.models.blip2_qformer",
        "causal_lm": "lavis.models.causal_lm",
    },
)
SOURCES: Registry[Any] = Registry(
    "source of data",
    lazy={"files": "lavis.data.sources"}
    | dict.fromkeys(["shapes_instruction", "shapes_caption", "shapes_text"], "lavis.data.shapes.source"),
)
MEDIA_FORMATS: Registry[Any] = Registry(
    "media format", lazy=dict.fromkeys(["minigpt4qwen", "llava"], "lavis.tokens.media")
)
DIALECTS: Registry[Any] = Registry(
    "dialect of annotations",
    lazy=dict.fromkeys(["minigpt4qwen", "alpaca"], "lavis.data.dialects.instruction")
    | dict.fromkeys(["llava", "sharegpt"], "lavis.data.dialects.conversations")
    | {"messages": "lavis.data.dialects.messages", "text": "lavis.data.dialects.document"}
    | dict.fromkeys(["preference", "prompt"], "lavis.data.dialects.preference"),
)
PROCESSORS: Registry[Any] = Registry(
    "processor",
    lazy=dict.fromkeys(["blip2_image_train", "blip2_image_eval", "blip_image_eval", "image_plain"], "lavis.data.image")
    | dict.fromkeys(["base_instruction", "blip_caption"], "lavis.data.text"),
)
TASKS: Registry[Any] = Registry(
    "task",
    lazy={
        "image_text_pretrain": "lavis.objectives.image_text",
        "deepspeed_image_text_pretrain": "lavis.objectives.image_text",
        "language_modeling": "lavis.objectives.language_modeling",
        "blip2_stage1": "lavis.objectives.blip2_stage1",
        "tokenizer_training": "lavis.tokens.training",
    },
)
RUNNERS: Registry[Any] = Registry(
    "runner",
    lazy={
        "runner_base": "lavis.train.runner",
        "deepspeed_runner": "lavis.train.zero_runner",
        "pipeline_runner": "lavis.train.pipeline_runner",
        "tokenizer_runner": "lavis.train.tokenizer_runner",
    },
)
LR_SCHEDULES: Registry[Any] = Registry(
    "learning-rate schedule",
    lazy=dict.fromkeys(
        [
            "constant_lr",
            "linear_warmup_cosine_lr",
            "linear_warmup_cosine_lr_step-wise",
            "linear_warmup_step_lr",
        ],
        "lavis.train.schedules",
    ),
)
