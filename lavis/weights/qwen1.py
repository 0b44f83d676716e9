"""First-generation Qwen folders (`model_type: qwen`) read as transformers' Qwen2. No remote code runs and no second
copy is written.

Up to `seq_length` tokens the two are the same function. Beyond it Qwen-1 changes its rotary base and scales its
queries, which Qwen2 does
not: so `seq_length` becomes the model's `max_position_embeddings`, and lavis.models.llm refuses longer contexts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from lavis.core.errors import CheckpointError
from lavis.core.json_file import read_json
from lavis.weights.qwen1_format import CONFIG, is_computed, qwen1_names, qwen2_names
from lavis.weights.shards import LazyTensor, Shards
from lavis.weights.tensors import check_fit

GENERATION = "generation_config.json"
FIXED = {"no_bias": True, "rotary_pct": 1.0, "scale_attn_weights": True, "emb_dropout_prob": 0.0}
"""Settings of a Qwen-1 configuration that Qwen2 has only with these values."""


def load_qwen1(folder: Path, dtype: torch.dtype | Literal["auto"], **options: Any) -> Qwen2ForCausalLM:
    """The model in `folder` in `dtype` (auto: the files'), in eval mode; `options` go to transformers (device_map,
    quantization_config).

    Tensors are read one by one, so little more memory is used than the model takes. Raises CheckpointError as
    open_qwen1 does.
    """
    config, tensors = open_qwen1(folder, None if dtype == "auto" else dtype)
    if dtype == "auto":
        dtype = tensors["model.norm.weight"][...].dtype
    model = Qwen2ForCausalLM.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, **options)
    model.generation_config = generation_config(folder)
    return model


def open_qwen1(folder: Path, dtype: torch.dtype | None = None) -> tuple[Qwen2Config, dict[str, LazyTensor]]:
    """Configuration and tensors of `folder` under Qwen2's names; the tensors are read when indexed
    (`tensors[name][...]`), as `dtype` if given.

    Raises CheckpointError if the folder is no Qwen-1 of whole weights, if a file is missing or damaged, or if the
    tensors are not
    exactly those of the configuration.
    """
    config = qwen2_config(folder)
    shards = Shards(folder)
    names = [
        n for n in qwen1_names(config.num_hidden_layers) if n != "lm_head.weight" or not config.tie_word_embeddings
    ]
    head = {"lm_head.weight"} - set(names)  # a tied head may be saved with the embedding it is tied to
    check_fit(folder, _shapes(config, names), shards.shapes, lambda name: name in head or is_computed(name))
    parts = {
        own: LazyTensor(shards, n, i, len(qwen2_names(n)), dtype) for n in names for i, own in enumerate(qwen2_names(n))
    }
    return config, parts


def qwen2_config(folder: Path) -> Qwen2Config:
    """The Qwen2 configuration that equals the Qwen-1 one in `folder`.

    Raises CheckpointError for one that has no equal.
    """
    file = folder / CONFIG
    values = read_json(file)
    if "quantization_config" in values:
        raise CheckpointError(
            f"{folder} holds quantised Qwen weights, which can't be read: take the folder of the same name without Int4"
            " or Int8, and set model.llm.quantization if memory is short."
        )
    strange = [
        f"{key} {values[key]!r} instead of {value!r}" for key, value in FIXED.items() if values.get(key, value) != value
    ]
    try:
        if values["kv_channels"] * values["num_attention_heads"] != values["hidden_size"]:
            strange.append("kv_channels x num_attention_heads unlike hidden_size")
        config = _as_qwen2(values)
    except KeyError as error:
        raise CheckpointError(
            f"{file} has no {error}: it is not the configuration of a Qwen-7B or Qwen-14B. Download it again."
        ) from error
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"{file} is not the configuration of a Qwen-7B or Qwen-14B: {error}") from error
    if strange:
        raise CheckpointError(
            f"{file} has {'; '.join(strange)}, which no released Qwen-7B or Qwen-14B has and Qwen2 can't be. Use"
            " another model."
        )
    return config


def _as_qwen2(values: dict[str, Any]) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"] // 2,  # Qwen-1 counts both branches
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=values["num_attention_heads"],
        num_key_value_heads=values["num_attention_heads"],
        max_position_embeddings=values["seq_length"],
        rms_norm_eps=values["layer_norm_epsilon"],
        initializer_range=values.get("initializer_range", 0.02),
        rope_parameters={"rope_type": "default", "rope_theta": float(values["rotary_emb_base"])},
        attention_dropout=values.get("attn_dropout_prob", 0.0),
        tie_word_embeddings=values["tie_word_embeddings"],
    )


def generation_config(folder: Path) -> GenerationConfig:
    """The folder's own generation settings, or none."""
    return GenerationConfig.from_pretrained(folder) if (folder / GENERATION).is_file() else GenerationConfig()


def _shapes(config: Qwen2Config, names: list[str]) -> dict[str, torch.Size]:
    """Shapes of the Qwen-1 tensors `names`, from those of the Qwen2 model they go into."""
    with torch.device("meta"):
        own = {name: tensor.shape for name, tensor in Qwen2ForCausalLM(config).state_dict().items()}
    rows = {name: [own[part] for part in qwen2_names(name)] for name in names}
    return {name: torch.Size((sum(p[0] for p in parts), *parts[0][1:])) for name, parts in rows.items()}
