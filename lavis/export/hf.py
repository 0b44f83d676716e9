"""`lavis export hf`: a run as a folder that stock transformers opens as Blip2ForConditionalGeneration."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from lavis.core.errors import CheckpointError, ConfigError
from lavis.core.registries import TASKS
from lavis.data.assemble import media_processor
from lavis.export.blip2 import as_blip2, blip2_config
from lavis.export.hf_processor import write_processor
from lavis.export.model_card import model_card
from lavis.export.trained import Trained
from lavis.models.configs import MiniGPT4QwenConfig
from lavis.models.llm import DTYPES
from lavis.models.minigpt4qwen import MiniGPT4Qwen
from lavis.objectives.base import Task
from lavis.runs.checkpoint import identity
from lavis.runs.folder import frozen_differences
from lavis.weights.tensors import load_tensors

if TYPE_CHECKING:
    from lavis.tokens.template import ChatTemplate

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 512
"""Longest answer by default, as in the original's demos."""
Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class HfExport:
    """What was written.

    `differences`: probe prompts that transformers encodes otherwise than this program, normally none.
    """

    folder: Path
    files: tuple[Path, ...]
    differences: tuple[str, ...]


def export_hf(
    trained: Trained, folder: Path, *, precision: Precision = "auto", max_shard_size: str = "5GB"
) -> HfExport:
    """Write model, processor, generation settings and model card to `folder`; weights in files of at most
    `max_shard_size`.

    precision: of all weights; `auto` keeps a frozen LLM's as its own files have them and writes the rest in fp32.
    Raises ConfigError when the folder is not empty, CheckpointError when the run's frozen weights have changed since.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: give a new folder, or empty this one.")
    _check_media(trained.model)
    task: Task = TASKS.get(trained.recipe.run.task)(trained.recipe)
    frozen = {key: identity(path) for key, path in task.frozen_files().items()}
    if changed := frozen_differences(trained.checkpoint.state().frozen, frozen):
        names = ", model.".join(changed)
        raise CheckpointError(
            f"{trained.checkpoint.path} was trained with other frozen weights than those there now: model.{names}. Put"
            " those back."
        )
    model = build(trained, task, precision)
    folder.mkdir(parents=True, exist_ok=True)
    _write_model(model, task.template, folder, max_shard_size)
    template = cast("ChatTemplate", task.template)  # a model that sees and answers has no other
    differences = write_processor(folder, task.tokenizer, template, media_processor(trained.recipe.model))
    for difference in differences:
        log.warning("stock transformers reads this prompt otherwise: %s", difference)
    (folder / "README.md").write_text(model_card(trained, differences), encoding="utf-8")
    return HfExport(folder, tuple(sorted(folder.iterdir())), tuple(differences))


def build(trained: Trained, task: Task, precision: Precision = "auto") -> MiniGPT4Qwen:
    """The trained model on the CPU, its LoRA adapters merged, in eval mode."""
    # A quantised LLM has lost its weights: the ones it was made from are exported.
    config = replace(trained.model, llm_quantization=None, llm_device_map=None)
    llm_frozen = config.freeze_llm and not (config.get_lora and "llm" in config.lora_parts)
    model = MiniGPT4Qwen.from_config(
        config, task.tokenizer, llm_dtype="auto" if precision == "auto" and llm_frozen else torch.float32
    )
    tensors = trained.checkpoint.tensors()
    load_tensors(
        model, tensors, file=trained.checkpoint.path, wanted=lambda name: name in tensors, ignored=lambda name: False
    )
    merge_lora(model)
    return (model if precision == "auto" else model.to(DTYPES[precision])).eval()


def merge_lora(model: nn.Module) -> None:
    """Add the LoRA adapters of `model` to the weights they belong to, and take them out."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # takes seconds

    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]:
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())


def _write_model(model: MiniGPT4Qwen, template: Any, folder: Path, max_shard_size: str) -> None:
    _give_placeholder_a_row(model, template.pad_token_id)
    config = blip2_config(model, template.stop_token_ids, template.pad_token_id)
    blip2 = as_blip2(model, config)
    settings = copy.deepcopy(model.llm_model.generation_config)
    settings.eos_token_id, settings.pad_token_id = list(template.stop_token_ids), template.pad_token_id
    settings.max_new_tokens = MAX_NEW_TOKENS
    settings._from_model_config = False  # else stock generation would make it anew from the configuration
    blip2.generation_config = settings
    blip2.save_pretrained(folder, max_shard_size=max_shard_size)
    # What stock transformers loads when asked for no type. save_pretrained wrote that of the query tokens.
    blip2.config.dtype = model.llm_model.dtype
    blip2.config.save_pretrained(folder)


def _give_placeholder_a_row(model: MiniGPT4Qwen, like: int) -> None:
    """Add embedding rows up to the image placeholder's, if it was added to the tokenizer: stock transformers looks it
    up before it replaces it.

    New rows equal row `like`, the padding's, which is never generated: so the new ids aren't either.
    """
    llm = model.llm_model
    rows = cast(torch.Tensor, llm.get_input_embeddings().weight).shape[0]
    if model.image_token_id < rows:
        return
    llm.resize_token_embeddings(model.image_token_id + 1, mean_resizing=False)
    with torch.no_grad():
        for tensor in (*llm.get_input_embeddings().parameters(), *llm.get_output_embeddings().parameters()):
            tensor[rows:] = tensor[like]


def _check_media(model: MiniGPT4QwenConfig) -> None:
    """Raise ConfigError where transformers' class cannot be given the pictures as this model is."""
    media = model.media
    if media.tiling != "none" or media.resize != "square":
        raise ConfigError(
            f"Blip2ForConditionalGeneration is shown a picture as one square, but model.media has tiling"
            f" {media.tiling}, resize {media.resize}: export with `lavis export pth`."
        )
