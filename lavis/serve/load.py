"""From what a user names (a run, an exported folder, a projection) to a model one can talk to."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lavis.config.files import missing_of, model_files
from lavis.config.recipe import load_model_config
from lavis.core.errors import ChatError, CheckpointError, ConfigError
from lavis.core.json_file import read_json
from lavis.core.paths import resolve
from lavis.core.registries import MODELS
from lavis.data.assemble import load_tokenizer, media_spec
from lavis.data.image import EvalImage
from lavis.export.hf import merge_lora
from lavis.export.hf_processor import exported_tokenizer
from lavis.export.trained import open_any_run
from lavis.generation.model import ChatModel
from lavis.models.configs import CausalLMConfig, MiniGPT4QwenConfig
from lavis.models.llm import DTYPES, frozen_dtype
from lavis.models.minigpt4qwen import MiniGPT4Qwen
from lavis.tokens.media import MediaSpec
from lavis.weights.tensors import load_tensors, read_tensors

log = logging.getLogger(__name__)

DEFAULT_TYPE = "qwen7b_chat"


def load_chat(
    *,
    run: str | Path | None = None,
    checkpoint: str | Path | None = None,
    model_type: str | None = None,
    device: torch.device | str | None = None,
    llm_device_map: str | None = None,
    dtype: str | None = None,
    options: list[str] | None = None,
) -> ChatModel:
    """The model that is named by one of

    - run: a run's folder, or one of its checkpoints/step-N;
    - checkpoint: a folder that `lavis export hf`, `lavis export peft` or save_pretrained wrote, or a file of trained
      parts (model.pth of the
      original, trainable.safetensors), which belongs to `model_type`;
    - model_type alone: what its default YAML names as `finetuned`.

    device: default a GPU if there is one. llm_device_map: cpu keeps the LLM there, auto spreads it over all devices
    beside the vision tower.
    dtype: of the LLM (fp32, bf16, fp16), default what suits the device. options: `key=value` of the model section.
    Raises ChatError if nothing is named, ConfigError and CheckpointError for wrong names and files.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    llm_dtype = DTYPES[dtype] if dtype else frozen_dtype(device)
    changes = {"llm_device_map": llm_device_map} if llm_device_map else {}
    folder = resolve(checkpoint) if checkpoint is not None else None
    if run is None and folder is not None and ((folder / "checkpoints").is_dir() or (folder / "COMPLETE").is_file()):
        run = folder
    if options and (run is not None or (folder is not None and (folder / "config.json").is_file())):
        raise ConfigError(
            "--options change the model that --model-type names; a run and an exported folder say themselves what they"
            " are: leave --options out."
        )
    if run is not None:
        return _of_run(Path(run), device, llm_dtype, changes)
    if folder is not None and (folder / "config.json").is_file():
        return _of_export(folder, device, llm_dtype, llm_device_map)
    return _of_type(model_type or DEFAULT_TYPE, folder, device, llm_dtype, changes, options or [])


def _of_run(where: Path, device: torch.device, dtype: torch.dtype, changes: dict[str, Any]) -> ChatModel:
    trained = open_any_run(where)
    config, tensors = trained.recipe.model, trained.checkpoint.tensors()
    if isinstance(config, CausalLMConfig):
        if changes:
            raise ConfigError(
                f"--llm_device_map is for models that see; {where} trained a {config.arch}: leave it out."
            )
        tokenizer = load_tokenizer(config)
        model = MODELS.get(config.arch).from_config(config, tokenizer)
    elif isinstance(config, MiniGPT4QwenConfig):
        config = replace(config, **changes, llm_grad_checkpoint=False)
        tokenizer = load_tokenizer(config)
        model = MiniGPT4Qwen.from_config(config, tokenizer, device, None if config.llm_quantization else dtype)
    else:
        raise ChatError(
            f"{where} trained a {config.arch}, which does not answer questions: name a run of minigpt4qwen or"
            " causal_lm."
        )
    load_tensors(
        model, tensors, file=trained.checkpoint.path, wanted=lambda name: name in tensors, ignored=lambda name: False
    )
    if isinstance(config, CausalLMConfig):
        model.to(dtype)
    return _ready(where.name, model, tokenizer, media_spec(config), device)


def _of_export(folder: Path, device: torch.device, dtype: torch.dtype, llm_device_map: str | None) -> ChatModel:
    model = MiniGPT4Qwen.from_pretrained(folder, device, llm_dtype=dtype)
    config = model.config
    if llm_device_map:
        model.place_llm(llm_device_map, device)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = exported_tokenizer(folder) if has_tokenizer else load_tokenizer(config)
    return _ready(folder.name, model, tokenizer, _exported_media(folder, config), device)


def _exported_media(folder: Path, config: Any) -> MediaSpec:
    """The model's, with the processor that `lavis export hf` wrote; a folder of save_pretrained has none."""
    media = media_spec(config)
    assert media
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            values = read_json(folder / name)
            values = values.get("image_processor", values)
            size, mean, std = values["size"]["height"], values["image_mean"], values["image_std"]
            return replace(media, processor=EvalImage(size, tuple(mean), tuple(std)))
    return media


def _of_type(
    model_type: str,
    checkpoint: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    changes: dict[str, Any],
    options: list[str],
) -> ChatModel:
    adapters = checkpoint if checkpoint and (checkpoint / "adapter_config.json").is_file() else None
    config = load_model_config("minigpt4qwen", model_type, options)
    assert isinstance(config, MiniGPT4QwenConfig)
    file = config.finetuned if checkpoint is None else str(checkpoint)
    if file is None:
        raise ChatError(
            f"nothing says how images reach the LLM of {model_type}: name a trained projection with -c, a run with"
            " --run, or try the small model that is included, --model-type shapes."
        )
    changes = changes | ({"load_finetuned": False} if adapters else {"load_finetuned": True, "finetuned": file})
    if adapters:
        changes |= _adapter_settings(adapters)
    elif not resolve(file).is_file():
        raise CheckpointError(
            f"there is no checkpoint {resolve(file)}: give a model.pth, a run's folder or an exported folder."
        )
    config = replace(config, **changes, llm_grad_checkpoint=False)
    if missing := missing_of(model_files(config)):
        lines = "\n".join(f"  {key}: {path}" for key, path in missing)
        raise CheckpointError(
            f"{model_type} needs files that are not there:\n{lines}\nPut them there, or name others with --options,"
            " such as llm_model=FOLDER (docs/weights.md)."
        )
    tokenizer = load_tokenizer(config)
    model = MiniGPT4Qwen.from_config(config, tokenizer, device, None if config.llm_quantization else dtype)
    if adapters:
        tensors = _peft_tensors(adapters)
        load_tensors(model, tensors, file=adapters, wanted=lambda name: name in tensors, ignored=lambda name: False)
    return _ready(model_type, model, tokenizer, media_spec(config), device)


def _adapter_settings(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return {"get_lora": True, "lora_parts": ["llm"], "lora_r": values["r"], "lora_alpha": values["lora_alpha"]}


def _peft_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What `lavis export peft` wrote, under our names."""
    adapters = {
        "llm_model." + name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): tensor
        for name, tensor in read_tensors(folder / "adapter_model.safetensors").items()
    }
    return adapters | read_tensors(folder / "projection.safetensors")


def _ready(name: str, model: Any, tokenizer: Any, media: MediaSpec | None, device: torch.device) -> ChatModel:
    config: Any = model.config if isinstance(model, MiniGPT4Qwen) else None
    if config and config.get_lora and not config.llm_quantization:
        merge_lora(model)
    model.requires_grad_(False)
    return ChatModel(name, model.to(device).eval(), tokenizer, media, device)
