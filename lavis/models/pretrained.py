"""Whole models in folders: `save_pretrained` and `from_pretrained` of a Vlm.

    config.json                the `model` section, the LLM's own configuration, the id of the image placeholder
    generation_config.json     the LLM's
    model*.safetensors         every tensor under its public name, LoRA adapters too; with an index when there are
                               several files

What transformers opens is another folder, which `lavis export hf` writes; it is read here as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lavis.config.compat import translate
from lavis.config.recipe import load_model_config
from lavis.config.typed import Problem, read_dataclass
from lavis.core.errors import CheckpointError, ConfigError
from lavis.core.json_file import read_json
from lavis.core.paths import resolve
from lavis.core.plugins import load_plugins
from lavis.core.registries import HF_MODELS
from lavis.models.configs import VlmConfig
from lavis.weights.shards import Shards
from lavis.weights.tensors import load_tensors

CONFIG = "config.json"
MODEL_TYPE, _OLD_TYPES = "lavis_vlm", ("minigpt4qwen",)
LLM = "llm_model."


def save_model(model: Any, folder: str | Path, max_shard_size: int | str) -> None:
    """Write the folder described above; files hold at most `max_shard_size` (bytes, or text such as 5GB).

    Raises ConfigError for a quantised LLM, whose weights are not there any more.
    """
    if kind := model.config.llm.quantization:
        raise ConfigError(f"an LLM in {kind} can't be saved: build the model without model.llm.quantization.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "model_type": MODEL_TYPE,
        "model": asdict(_without_files(model.config)),
        "llm": model.llm_model.config.to_dict(),
        "image_token_id": model.image_token_id,
    }
    (folder / CONFIG).write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
    model.llm_model.generation_config.save_pretrained(folder)
    save_torch_state_dict(model.state_dict(), folder, max_shard_size=max_shard_size, metadata={"format": "pt"})


def load_model(
    cls: Callable[..., Any], folder: str | Path, frozen: torch.dtype, llm_dtype: torch.dtype | None = None
) -> Any:
    """The model in `folder`, on the CPU in eval mode: a frozen LLM in `frozen`, all else in fp32; the LLM in
    `llm_dtype` if one is given. `cls` is what makes it.

    Raises CheckpointError when the folder is not one of the kinds that are read, or is incomplete.
    """
    load_plugins()  # the folder names its parts, which may be of an installed package
    where = resolve(folder)
    values, shards = _read_config(where), Shards(where)
    if values["model_type"] in HF_MODELS:
        stock = HF_MODELS.get(values["model_type"])
        config, llm_config = stock.config(values, str(where)), values["text_config"]
        image_token_id = stock.image_token_id(values)
    else:
        config = _read_section(values["model"], where)
        llm_config, image_token_id = values["llm"], values["image_token_id"]
    tensors = _read_tensors(shards, values, where)
    dtype = llm_dtype or (torch.float32 if config.llm.train == "full" else frozen)
    model = cls(config, _llm(llm_config, tensors, where, dtype), image_token_id, all_on_meta=True)
    model.add_adapters()
    state = model.state_dict()
    held = {state[name].data_ptr() for name in tensors.keys() & state.keys() if not state[name].is_meta}
    tied = {name for name, tensor in state.items() if name not in tensors and tensor.data_ptr() in held}
    load_tensors(model, tensors, file=where, wanted=lambda name: name not in tied)
    for part in model.image_parts():
        part.complete()
    return model.eval()


def tensors_of(folder: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a whole model in `folder`, by public names; None if it holds something else."""
    if not (folder / CONFIG).is_file():
        return None
    values = read_json(folder / CONFIG)
    return _read_tensors(Shards(folder), values, folder) if values.get("model_type") in _known_types() else None


def _read_tensors(shards: Shards, values: Mapping[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    tensors = {name: shards.read(name) for name in shards.shapes}
    if values["model_type"] not in HF_MODELS:
        return tensors
    stock = HF_MODELS.get(values["model_type"])
    return stock.tensors(tensors, stock.config(values, str(folder)))


def _known_types() -> tuple[str, ...]:
    return MODEL_TYPE, *_OLD_TYPES, *HF_MODELS.list()


def _without_files(config: VlmConfig) -> VlmConfig:
    """`config` of a model that brings its weights itself; the LLM's name stays, for its tokenizer."""
    parts: dict[str, Any] = {"tower": config.tower, "connector": config.connector}
    parts = {name: part and part.without_files() for name, part in parts.items()}
    return replace(config, **parts, llm=replace(config.llm, device_map=None), released=None)


def is_text_llm(folder: Path) -> bool:
    """Whether `folder` holds a causal LM alone, as transformers saves one."""
    model_type = read_json(folder / CONFIG).get("model_type")
    return model_type not in _known_types() and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _read_config(folder: Path) -> dict[str, Any]:
    values = read_json(folder / CONFIG)
    if values.get("model_type") not in _known_types():
        raise CheckpointError(
            f"{folder} holds a model of type {values.get('model_type')!r}: give a folder that save_pretrained or `lavis"
            f" export hf` wrote, or one of another {' or '.join(HF_MODELS.list())} with a causal LLM."
        )
    return values


def _read_section(values: Mapping[str, Any], folder: Path) -> VlmConfig:
    layers, _, wrong = translate([{"model": values}])  # it may be spelt as by an older version
    problems: list[Problem] = []
    config = read_dataclass(VlmConfig, layers[0]["model"], "model", problems)
    if problems or wrong:
        raise ConfigError(
            f"{folder / CONFIG}: "
            + "; ".join(f"{p.key}: {p.message}" for p in problems)
            + ". Was it written by another version?"
        )
    section = layers[0]["model"]
    if "media" not in section and section.get("preset"):  # older ones said nothing of pictures, but which type they are
        group, _, name = section["preset"].rpartition("/")
        preset: Any = load_model_config(group, name)
        config = replace(config, media=preset.media)
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
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    llm = causal.from_pretrained(None, config=config, state_dict=own, dtype=dtype)
    llm.generation_config = GenerationConfig.from_pretrained(folder)
    return llm
