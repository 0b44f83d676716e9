"""From what a user names (a run, an exported folder, a projection) to a model one can talk to."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lavis.config.compat.model import ORIGINAL
from lavis.config.files import missing_of, model_files
from lavis.config.init import Init, inits
from lavis.config.recipe import load_model_config
from lavis.core.errors import ChatError, CheckpointError, ConfigError
from lavis.core.paths import resolve
from lavis.core.registries import MODELS
from lavis.data.assemble import load_tokenizer, media_spec
from lavis.export.hf_processor import exported_tokenizer
from lavis.export.trained import open_any_run
from lavis.generation.model import ChatModel
from lavis.models.adapters import merge_lora
from lavis.models.configs import VlmConfig
from lavis.models.llm import DTYPES, frozen_dtype
from lavis.models.parts import LoraSettings
from lavis.models.pretrained import is_text_llm
from lavis.models.vlm import Vlm
from lavis.tokens.chat_templates import chat_template_named
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
    - checkpoint: a folder that `lavis export hf`, `lavis export peft` or save_pretrained wrote, a text LLM's folder, or
      a file of trained parts (model.pth of the original, trainable.safetensors), which belongs to `model_type`;
    - model_type alone (a preset: qwen7b_chat, or FOLDER/NAME): with what it names as `released`.

    device: default a GPU if there is one. llm_device_map: cpu keeps the LLM there, auto spreads it over all devices
    beside the vision tower. dtype: of the LLM (fp32, bf16, fp16), default what suits the device. options: `key=value`
    of the model section. Raises ChatError if nothing is named, ConfigError and CheckpointError for wrong names and
    files.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    llm_dtype = DTYPES[dtype] if dtype else frozen_dtype(device)
    folder = resolve(checkpoint) if checkpoint is not None else None
    if run is None and folder is not None and ((folder / "checkpoints").is_dir() or (folder / "COMPLETE").is_file()):
        run = folder
    exported = folder is not None and (folder / "config.json").is_file()
    if options and (run is not None or exported):
        raise ConfigError(
            "--options change the model that --model-type names; a run and an exported folder say themselves what they"
            " are: leave --options out."
        )
    if run is not None:
        return _of_run(Path(run), device, llm_dtype, llm_device_map)
    if folder is not None and exported:
        return _of_export(folder, device, llm_dtype, llm_device_map)
    return _of_type(model_type or DEFAULT_TYPE, folder, device, llm_dtype, llm_device_map, options or [])


def _of_run(where: Path, device: torch.device, dtype: torch.dtype, device_map: str | None) -> ChatModel:
    trained = open_any_run(where)
    if trained.recipe.model.row_format != "chat":
        raise ChatError(
            f"{where} trained a {trained.recipe.model.arch}, which does not answer questions: name a run of a model"
            " with an LLM."
        )
    config, tensors = _for_chat(trained.model, device_map), trained.checkpoint.tensors()
    tokenizer = load_tokenizer(config)
    model = _build(config, tokenizer, device, dtype, inits(trained.recipe.init))
    load_tensors(model, tensors, file=trained.checkpoint.path, wanted=lambda name: name in tensors)
    if not config.llm.weights:  # a new one is made in fp32
        model.to(dtype)
    return _ready(where.name, model, tokenizer, device)


def _for_chat(config: VlmConfig, device_map: str | None) -> VlmConfig:
    return replace(config, llm=replace(config.llm, device_map=device_map or config.llm.device_map, recompute=False))


def _build(
    config: VlmConfig, tokenizer: Any, device: torch.device, dtype: torch.dtype, init: Sequence[Init] = ()
) -> Vlm:
    return MODELS.get(config.arch).from_config(
        config, tokenizer, device, None if config.llm.quantization else dtype, init=init
    )


def _of_export(folder: Path, device: torch.device, dtype: torch.dtype, device_map: str | None) -> ChatModel:
    if is_text_llm(folder):
        config = _for_chat(VlmConfig(), device_map)
        config = replace(config, llm=replace(config.llm, weights=str(folder)))
        tokenizer = load_tokenizer(config)
        return _ready(folder.name, _build(config, tokenizer, device, dtype), tokenizer, device)
    model = Vlm.from_pretrained(folder, device, llm_dtype=dtype)
    if device_map:
        model.place_llm(device_map, device)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = exported_tokenizer(folder) if has_tokenizer else load_tokenizer(model.config)
    if model.config.chat_template:
        tokenizer.chat_template = chat_template_named(model.config.chat_template)
    return _ready(folder.name, model, tokenizer, device)


def _of_type(
    model_type: str,
    checkpoint: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    device_map: str | None,
    options: list[str],
) -> ChatModel:
    adapters = checkpoint if checkpoint is not None and (checkpoint / "adapter_config.json").is_file() else None
    folder, _, name = model_type.rpartition("/")
    section: Any = load_model_config(folder or ORIGINAL, name, options)
    config = _for_chat(section, device_map)
    init = [] if adapters else _trained_parts(model_type, config, checkpoint)
    if adapters:
        config = replace(config, llm=replace(config.llm, train="lora", lora=_adapter_settings(adapters)))
    if missing := missing_of(model_files(config)):
        lines = "\n".join(f"  {key}: {path}" for key, path in missing)
        raise CheckpointError(
            f"{model_type} needs files that are not there:\n{lines}\nPut them there, or name others with --options,"
            " such as llm.weights=FOLDER (docs/weights.md)."
        )
    tokenizer = load_tokenizer(config)
    model = _build(config, tokenizer, device, dtype, init)
    if adapters:
        tensors = _peft_tensors(adapters)
        load_tensors(model, tensors, file=adapters, wanted=lambda name: name in tensors)
    return _ready(model_type, model, tokenizer, device)


def _trained_parts(model_type: str, config: VlmConfig, checkpoint: Path | None) -> list[Init]:
    """The file of trained parts that is named, or released with the preset; none where the preset is whole."""
    file = config.released if checkpoint is None else str(checkpoint)
    if file is None:
        if config.connector is None or config.connector.whole:
            return []
        raise ChatError(
            f"nothing says how images reach the LLM of {model_type}: name a trained projection with -c, a run with"
            " --run, or try the small model that is included, --model-type shapes."
        )
    if not resolve(file).is_file():
        raise CheckpointError(
            f"there is no checkpoint {resolve(file)}: give a model.pth, a run's folder or an exported folder."
        )
    return [Init(file)]


def _adapter_settings(folder: Path) -> LoraSettings:
    values = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return LoraSettings(rank=values["r"], alpha=values["lora_alpha"], targets=values["target_modules"])


def _peft_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What `lavis export peft` wrote, under our names."""
    adapters = {
        "llm_model." + name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): tensor
        for name, tensor in read_tensors(folder / "adapter_model.safetensors").items()
    }
    rest = folder / "projection.safetensors"
    return adapters | (read_tensors(rest) if rest.is_file() else {})


def _ready(name: str, model: Vlm, tokenizer: Any, device: torch.device) -> ChatModel:
    if not model.config.llm.quantization:
        merge_lora(model)
    model.requires_grad_(False)
    return ChatModel(name, model.to(device).eval(), tokenizer, media_spec(model.config), device)
