"""Whole models in folders: `save_pretrained` and `from_pretrained` of MiniGPT4Qwen.

    config.json                the `model` section, the LLM's own configuration, the id of the image placeholder
    generation_config.json     the LLM's
    model*.safetensors         every tensor under its own name, LoRA adapters too; with an index when there are several
    files

What transformers opens is another folder, which `lavis export hf` writes; it is read here as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig, PreTrainedModel

from lavis.config.recipe import load_model_config
from lavis.config.typed import Problem, read_dataclass
from lavis.core.errors import CheckpointError, ConfigError
from lavis.core.json_file import read_json
from lavis.core.paths import resolve
from lavis.export.blip2 import MODEL_TYPE, own_config, own_tensors
from lavis.models.configs import MiniGPT4QwenConfig
from lavis.weights.shards import Shards
from lavis.weights.tensors import load_configured, load_tensors

if TYPE_CHECKING:
    from lavis.models.minigpt4qwen import MiniGPT4Qwen

CONFIG = "config.json"
LLM = "llm_model."


def save_model(model: MiniGPT4Qwen, folder: str | Path, max_shard_size: int | str) -> None:
    """Write the folder described above; files hold at most `max_shard_size` (bytes, or text such as 5GB).

    Raises ConfigError for a quantised LLM, whose weights are not there any more.
    """
    if model.config.llm_quantization:
        raise ConfigError(
            f"an LLM in {model.config.llm_quantization} can't be saved: build the model without model.llm_quantization."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "model_type": model.config.arch,
        "model": asdict(_without_files(model.config)),
        "llm": model.llm_model.config.to_dict(),
        "image_token_id": model.image_token_id,
    }
    (folder / CONFIG).write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
    model.llm_model.generation_config.save_pretrained(folder)
    save_torch_state_dict(model.state_dict(), folder, max_shard_size=max_shard_size, metadata={"format": "pt"})


def load_model(
    cls: type[MiniGPT4Qwen], folder: str | Path, frozen: torch.dtype, llm_dtype: torch.dtype | None = None
) -> MiniGPT4Qwen:
    """The model in `folder`, on the CPU in eval mode: a frozen LLM in `frozen`, all else in fp32; the LLM in
    `llm_dtype` if one is given.

    Raises CheckpointError when the folder is not one of the two kinds, or is incomplete.
    """
    where = resolve(folder)
    values, shards = _read_config(where), Shards(where)
    tensors = {name: shards.read(name) for name in shards.shapes}
    if values.get("model_type") == MODEL_TYPE:
        config, tensors = own_config(values, str(where)), own_tensors(tensors)
        llm_config, image_token_id = values["text_config"], values["image_token_index"]
    else:
        config = _read_section(values["model"], where)
        llm_config, image_token_id = values["llm"], values["image_token_id"]
    llm = _llm(llm_config, tensors, where, llm_dtype or (frozen if config.freeze_llm else torch.float32))
    model = cls(config, llm, image_token_id, on_meta=True)
    model.add_adapters()
    state = model.state_dict()
    held = {state[name].data_ptr() for name in tensors.keys() & state.keys() if not state[name].is_meta}
    tied = {name for name, tensor in state.items() if name not in tensors and tensor.data_ptr() in held}
    load_tensors(model, tensors, file=where, wanted=lambda name: name not in tied, ignored=lambda name: False)
    load_configured(model, config)
    return model.eval()


def _without_files(config: MiniGPT4QwenConfig) -> MiniGPT4QwenConfig:
    """`config` of a model that brings its weights itself."""
    return replace(config, load_pretrained=False, load_finetuned=False, llm_device_map=None)


def _read_config(folder: Path) -> dict[str, Any]:
    values = read_json(folder / CONFIG)
    if values.get("model_type") not in (MODEL_TYPE, "minigpt4qwen"):
        raise CheckpointError(
            f"{folder} holds a model of type {values.get('model_type')!r}: give a folder that save_pretrained or `lavis"
            f" export hf` wrote, or one of another {MODEL_TYPE} with a causal LLM."
        )
    return values


def _read_section(values: Mapping[str, Any], folder: Path) -> MiniGPT4QwenConfig:
    problems: list[Problem] = []
    if "media" not in values:  # saved before pictures were the model's matter: then those of its type
        values = {**values, "media": asdict(load_model_config(values["arch"], values["model_type"]).media)}
    config = read_dataclass(MiniGPT4QwenConfig, values, "model", problems)
    if problems:
        raise ConfigError(
            f"{folder / CONFIG}: "
            + "; ".join(f"{p.key}: {p.message}" for p in problems)
            + ". Was it written by another version?"
        )
    return config


def _llm(
    values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], folder: Path, dtype: torch.dtype
) -> PreTrainedModel:
    """The LLM without its adapters. transformers makes it from its tensors, so no time goes into random ones."""
    config = AutoConfig.for_model(**values)
    # The module under an adapter is called base_layer.
    own = {
        k.removeprefix(LLM).replace(".base_layer.", "."): v
        for k, v in tensors.items()
        if k.startswith(LLM) and ".lora_" not in k
    }
    llm = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(None, config=config, state_dict=own, dtype=dtype)
    llm.generation_config = GenerationConfig.from_pretrained(folder)
    return llm
