"""A first-generation Qwen folder written as the Qwen2 folder it equals, for tools that know only the latter."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import cast

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from lavis.core.errors import CheckpointError, ConfigError
from lavis.tokens.qwen1 import END, PAD, START, qwen1_tokenizer
from lavis.weights.qwen1 import generation_config, open_qwen1
from lavis.weights.qwen1_format import is_qwen1
from lavis.weights.shards import LazyTensor

log = logging.getLogger(__name__)

WEIGHTS = "model{suffix}.safetensors"


def convert_qwen1(source: Path, target: Path, max_shard_size: str = "2GB") -> list[Path]:
    """Write `source` to the new folder `target`: configuration, weights in the types they have, tokenizer, generation
    settings.

    Files hold at most `max_shard_size`, and no more than one is in memory at a time. The folder appears when it is
    whole.
    Returns its files. Raises ConfigError if `target` exists, CheckpointError or DataError for a wrong source.
    """
    if target.exists():
        raise ConfigError(f"{target} exists: choose a new folder.")
    if not is_qwen1(source):
        raise CheckpointError(
            f"{source} is no first-generation Qwen folder: it has no config.json with model_type qwen. Newer models"
            " need no conversion."
        )
    config, tensors = open_qwen1(source)
    tokenizer = qwen1_tokenizer(source)
    stops, pad = cast(list[int], tokenizer.convert_tokens_to_ids([END, START, PAD])), tokenizer.pad_token_id
    config.update({"architectures": ["Qwen2ForCausalLM"], "eos_token_id": stops[0], "pad_token_id": pad})
    config.dtype = next(iter(tensors.values()))[...].dtype
    generation = generation_config(source)
    generation.update(eos_token_id=stops, pad_token_id=pad)
    building = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    for part in (config, generation, tokenizer):
        part.save_pretrained(building)
    _write_weights(building, tensors, max_shard_size)
    building.rename(target)
    return sorted(target.iterdir())


def _write_weights(folder: Path, tensors: dict[str, LazyTensor], max_shard_size: str) -> None:
    plan = split_state_dict_into_shards_factory(
        tensors, get_storage_size=lambda tensor: tensor.nbytes, filename_pattern=WEIGHTS, max_shard_size=max_shard_size
    )
    for file, names in plan.filename_to_tensors.items():
        save_file({name: tensors[name][...] for name in names}, folder / file, metadata={"format": "pt"})
        log.info("%s written", file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{WEIGHTS.format(suffix='')}.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
