"""Causal LMs of transformers: making, loading and adapting them."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from lavis.core.errors import CheckpointError, ConfigError
from lavis.core.paths import resolve
from lavis.models.attention import (
    Runs,
    Samples,
    are_packed,
    attending,
    first_places,
    flat,
    in_rows,
    places,
    prepared,
    runs_of,
)
from lavis.models.beginning import Beginning
from lavis.models.parts import LlmConfig
from lavis.weights.gguf import gguf_arguments, is_gguf
from lavis.weights.qwen1 import load_qwen1
from lavis.weights.qwen1_format import is_qwen1

if not sys.stderr.isatty():
    transformers_logging.disable_progress_bar()

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def frozen_dtype(device: torch.device | str) -> torch.dtype:
    """Type of a frozen LLM's weights: bf16 on a GPU that has it, fp16 on one that does not, fp32 on the CPU."""
    if torch.device(device).type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def load_llm(
    name: str,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    *,
    device_map: str | dict[str, int | str] | None = None,
    max_memory: dict[int | str, int] | None = None,
    quantization: str | None = None,
) -> PreTrainedModel:
    """The causal LM in the folder or GGUF file `name` (relative paths: see lavis.core.paths.resolve) or of that name on
    the hub.

    dtype: of the weights that are not quantised. device_map: transformers' (`auto` spreads the layers over the devices
    that are there,
    each filled up to max_memory bytes).
    quantization: int8 or int4 (bitsandbytes). Raises CheckpointError when there is no such LLM.
    """
    folder = resolve(name)
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(folder if folder.exists() else name)}
    source = gguf_arguments(name) if is_gguf(name) else source
    settings: dict[str, Any] = {
        "dtype": dtype,
        "device_map": device_map,
        "max_memory": max_memory,
        "quantization_config": _quantization(quantization, dtype),
    }
    options = {key: value for key, value in settings.items() if value is not None}
    if is_qwen1(folder):
        return load_qwen1(folder, **options)
    try:
        return AutoModelForCausalLM.from_pretrained(**source, **options, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"no language model could be loaded from {name!r} (looked in {folder}): {error}\nPut the model's folder"
            " there, or set model.llm.weights to its path or hub name. It must be an architecture that transformers has"
            " built in, or first-generation Qwen, which is read from a folder (not by its hub name)."
        ) from error


def free_memory(reserved: int, gpu: int = 0) -> dict[int | str, int]:
    """Device to bytes free there, with `reserved` bytes of one GPU kept for other parts.

    The host is the last resort.
    """
    from accelerate.utils import get_max_memory

    free = get_max_memory()
    return {device: max(0, room - reserved) if device == gpu else room for device, room in free.items()}


def spread(llm: PreTrainedModel, max_memory: dict[int | str, int]) -> None:
    """Put the layers of a loaded `llm` on the devices of `max_memory`, evenly, and have their inputs follow them."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = list(llm._no_split_modules or [])
    max_memory = get_balanced_memory(llm, max_memory, no_split_module_classes=whole, dtype=llm.dtype)
    device_map = infer_auto_device_map(llm, max_memory, no_split_module_classes=whole)
    dispatch_model(llm, device_map)


def _quantization(kind: str | None, dtype: torch.dtype | Literal["auto"]) -> BitsAndBytesConfig | None:
    """bitsandbytes' settings of a recipe's `quantization`. Raises ConfigError if it is not installed."""
    if kind is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.llm.quantization {kind} needs bitsandbytes: pip install 'lavis[quant]', or set it to null."
        )
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def new_llm(llm_config: dict[str, Any], vocab_size: int, special_ids: dict[str, Any]) -> PreTrainedModel:
    """A randomly initialised causal LM from a transformers configuration given as a dict with `model_type`.

    `special_ids` holds pad_token_id, eos_token_id, ... Raises ConfigError when transformers refuses the configuration.
    """
    config = new_config(llm_config, vocab_size, special_ids)
    try:
        return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"model.llm.config is not a configuration transformers accepts: {error}") from error


def new_config(llm_config: dict[str, Any], vocab_size: int, special_ids: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of `new_llm`."""
    values = dict(llm_config)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise ConfigError("model.llm.config has no `model_type`: name the architecture, for example qwen2 or llama.")
    try:
        return AutoConfig.for_model(model_type, vocab_size=vocab_size, **special_ids, **values)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"model.llm.config is not a configuration transformers accepts: {error}") from error


def build_llm(
    config: LlmConfig,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype | Literal["auto"],
    max_memory: dict[int | str, int] | None = None,
) -> PreTrainedModel:
    """The LLM that a recipe's section names, in `dtype`, or a new one in fp32 of the dimensions it gives, for the
    tokenizer's vocabulary.
    """
    if not config.weights:
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        return new_llm(config.config, len(tokenizer), ids)
    return load_llm(
        config.weights,
        dtype,
        device_map=config.device_map,
        max_memory=max_memory,
        quantization=config.quantization,
    )


def context_length(llm: PreTrainedModel) -> int:
    """The most positions `llm` can tell apart, tokens; beyond them its answers would be wrong without an error."""
    # Models without positions of their own, such as Mamba, name no limit.
    return getattr(llm.config.get_text_config(), "max_position_embeddings", sys.maxsize)


def check_context(llm: PreTrainedModel, max_length: int) -> None:
    """Raise ConfigError if samples of `max_length` tokens are more than `llm` can read."""
    if max_length > context_length(llm):
        raise ConfigError(
            f"model.max_length is {max_length}, but the LLM reads at most {context_length(llm)} tokens: lower it, or"
            " choose another LLM."
        )


def hidden_states(
    llm: PreTrainedModel,
    inputs_embeds: torch.Tensor,
    position_ids: torch.Tensor,
    runs: Runs = (),
    beginning: Beginning | None = None,
    in_place: bool = False,
) -> torch.Tensor:
    """The last hidden states [B, L, D] of inputs_embeds [B, L, D], behind the final norm.

    position_ids: int64 [B, L], restarting with each packed sample. runs: lengths of the samples of each row, known
    without a look at the device; those that positions say if not given. beginning: of all samples, not run again.
    Padding is not run, and gives zeros; an LLM that cannot attend within samples runs it, and transformers masks
    attention by the positions. in_place: rows of one sample keep their padding, so that what is dropped out, which is
    drawn for a shape, does not depend on how others are padded.
    """
    if not prepared(llm):
        out = llm.base_model(inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=False)
        return out.last_hidden_state
    runs = runs or runs_of(position_ids)
    if in_place and not are_packed(runs):
        return _attending(llm, Samples(()), inputs_embeds, position_ids)
    (rows, width), device = position_ids.shape, inputs_embeds.device
    before = len(beginning) if beginning else 0
    where = places(runs, width, device, before)
    lengths = tuple(length - before for row in runs for length in row)
    samples = Samples(lengths, beginning.layers if beginning else ())
    out = _attending(llm, samples, flat(inputs_embeds, where), flat(position_ids, where))
    hidden = in_rows(out, where, (rows, width))
    if beginning is None:
        return hidden
    at = first_places(runs, width, device, before)
    first = beginning.hidden[0].to(hidden.dtype).repeat(len(lengths), 1)
    return hidden.flatten(0, 1).index_copy(0, at, first).view_as(hidden)


def _attending(
    llm: PreTrainedModel, samples: Samples, inputs_embeds: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    # with a mask given, transformers does not look for borders in the positions, for which the host would wait
    seen = torch.ones(1, 1, dtype=torch.bool, device=inputs_embeds.device).expand(position_ids.shape)
    with attending(samples):
        out = llm.base_model(
            inputs_embeds=inputs_embeds, attention_mask=seen, position_ids=position_ids, use_cache=False
        )
    return out.last_hidden_state


def recompute_activations(llm: PreTrainedModel) -> None:
    """Keep the inputs of `llm`'s blocks alone and run each again in the backward pass."""
    # older versions of transformers know the second name alone
    enable = getattr(llm, "activation_checkpointing_enable", None) or llm.gradient_checkpointing_enable
    enable({"use_reentrant": False})
