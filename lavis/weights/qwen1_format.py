"""What marks a first-generation Qwen folder, and the names of its tensors in transformers' Qwen2, whose architecture is
the same. Torch-free.

Qwen-1 fuses q, k and v in `c_attn`, one below the other, and its MLP is `c_proj(w1(x) * silu(w2(x)))`, so w2 is the
gate.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lavis.core.json_file import read_json

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
_ENDS = {
    "transformer.wte.weight": ("model.embed_tokens.weight",),
    "transformer.ln_f.weight": ("model.norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
}
_BLOCK = {
    "ln_1.weight": ("input_layernorm.weight",),
    "attn.c_attn.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attn.c_attn.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "attn.c_proj.weight": ("self_attn.o_proj.weight",),
    "ln_2.weight": ("post_attention_layernorm.weight",),
    "mlp.w1.weight": ("mlp.up_proj.weight",),
    "mlp.w2.weight": ("mlp.gate_proj.weight",),
    "mlp.c_proj.weight": ("mlp.down_proj.weight",),
}
_COMPUTED = r"rotary_emb\.inv_freq|attn\.(bias|masked_bias|logn_tensor)"


def is_qwen1(folder: Path) -> bool:
    """Whether `folder` holds a first-generation Qwen.

    Raises CheckpointError for a config.json that is no JSON object.
    """
    file = folder / CONFIG
    return file.is_file() and read_json(file).get("model_type") == "qwen"


def qwen2_names(name: str) -> tuple[str, ...]:
    """Qwen2's names for the Qwen-1 tensor `name`, which each take an equal share of its rows, in this order; none if it
    is no such tensor.
    """
    block = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", name)
    if block is None:
        return _ENDS.get(name, ())
    return tuple(f"model.layers.{block[1]}.{own}" for own in _BLOCK.get(block[2], ()))


def qwen1_names(num_layers: int) -> list[str]:
    """The tensors of a Qwen-1 model of `num_layers` blocks."""
    return [*_ENDS, *(f"transformer.h.{i}.{name}" for i in range(num_layers) for name in _BLOCK)]


def is_computed(name: str) -> bool:
    """Whether the Qwen-1 tensor `name` is no weight but a table that some versions save (rotary, log-n, masks)."""
    return (
        re.fullmatch(rf"transformer\.(h\.\d+\.)?({_COMPUTED})|transformer\.h\.\d+\.attn\.rotary_emb\.inv_freq", name)
        is not None
    )


def with_qwen2_names(
    tensors: Mapping[str, torch.Tensor], prefix: str, keep: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """`tensors` with those named `prefix` and a Qwen-1 name renamed and split as Qwen2 has them; the others, and those
    in `keep`, stay.

    GPT-2, for one, has tensors of the same names.
    """
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix(prefix)
        foreign = name.startswith(prefix) and name not in keep
        if foreign and (names := qwen2_names(bare)):
            renamed |= {prefix + own: part for own, part in zip(names, tensor.chunk(len(names)), strict=True)}
        elif not (foreign and is_computed(bare)):
            renamed[name] = tensor
    return renamed
