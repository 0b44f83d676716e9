"""The registries of the program, with the modules that fill them. Importing this imports no model."""

from __future__ import annotations

from typing import Any

from lavis.core.registry import Registry

MODELS: Registry[Any] = Registry(
    "model",
    lazy={
        "vlm": "lavis.models.vlm",
        "blip2_qformer": "lavis.models.blip2_qformer",
    },
)
MODEL_CONFIGS: Registry[Any] = Registry(
    "model", lazy=dict.fromkeys(["vlm", "blip2_qformer", "byte_level_bpe"], "lavis.models.configs")
)
"""Name of a model to the dataclass of its `model` section, torch-free."""
_HF_TOWERS = {
    "hf_vision": "HfVisionConfig",
    "clip": "ClipConfig",
    "siglip": "SiglipConfig",
    "siglip2": "SiglipConfig",
    "dinov2": "Dinov2Config",
}
TOWERS: Registry[Any] = Registry(
    "vision tower",
    lazy={"eva_clip_g": "lavis.models.towers.eva", "timm": "lavis.models.towers.timm_vit"}
    | dict.fromkeys(_HF_TOWERS, "lavis.models.towers.transformers_vision"),
    configs={
        "eva_clip_g": "lavis.models.part_configs:EvaConfig",
        "timm": "lavis.models.tower_configs:TimmConfig",
        **{name: f"lavis.models.tower_configs:{config}" for name, config in _HF_TOWERS.items()},
    },
)
CONNECTORS: Registry[Any] = Registry(
    "connector",
    lazy={
        name: f"lavis.models.connectors.{name}"
        for name in ("qformer_linear", "linear", "mlp", "pixel_shuffle", "resampler")
    },
    configs={
        "qformer_linear": "lavis.models.part_configs:QFormerLinearConfig",
        "linear": "lavis.models.connector_configs:LinearConfig",
        "mlp": "lavis.models.connector_configs:MlpConfig",
        "pixel_shuffle": "lavis.models.connector_configs:PixelShuffleConfig",
        "resampler": "lavis.models.connector_configs:ResamplerConfig",
    },
)
EXPORTERS: Registry[Any] = Registry(
    "export format",
    lazy={
        "blip2": "lavis.export.hf",
        "llava": "lavis.export.llava",
        "text_llm": "lavis.export.text_llm",
        "peft": "lavis.export.files",
        "pth": "lavis.export.files",
    },
)
HF_MODELS: Registry[Any] = Registry(
    "transformers model type", lazy={"blip-2": "lavis.models.hf.blip2", "llava": "lavis.models.hf.llava"}
)
"""model_type of a transformers folder to what reads it as a Vlm: config(values, where), tensors(tensors, config) and
image_token_id(values) of the values in its config.json."""
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
OBJECTIVES: Registry[Any] = Registry(
    "objective",
    lazy={
        "sft": "lavis.objectives.sft",
        "document": "lavis.objectives.sft",
        "blip2_stage1": "lavis.objectives.blip2_stage1",
        "tokenizer_training": "lavis.tokens.training",
    },
)
STRATEGIES: Registry[Any] = Registry(
    "strategy",
    lazy={
        "data_parallel": "lavis.parallel.strategy",
        "zero": "lavis.parallel.zero",
        "pipeline": "lavis.parallel.pipeline",
    },
)
OPTIMIZERS: Registry[Any] = Registry(
    "optimiser", lazy=dict.fromkeys(["adamw", "adamw_8bit", "lion", "muon"], "lavis.parallel.optimizers")
)
METRICS: Registry[Any] = Registry("metric", lazy={"accuracy": "lavis.eval.metrics"})
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
