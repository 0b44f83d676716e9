"""Names of the original's weight files (LAVIS, MiniGPT4Qwen): one adapter for reading, converting and writing.

The Q-Former is BERT there (`Qformer.bert.encoder...self.query`) and transformers' here; all else is called the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

Tensors = dict[str, torch.Tensor]

_TO_OWN = (
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "Qformer.layernorm."),
    (r"^Qformer\.bert\.encoder\.", "Qformer.encoder."),
    (r"^(Qformer\..*)\.(attention|crossattention)\.self\.", r"\1.\2.attention."),
)
_TO_ORIGINAL = (
    (r"^Qformer\.layernorm\.", "Qformer.bert.embeddings.LayerNorm."),
    (r"^Qformer\.encoder\.", "Qformer.bert.encoder."),
    (r"^(Qformer\..*\.(?:cross)?attention)\.attention\.", r"\1.self."),
)
_ELSEWHERE = re.compile(
    r"(llm_model|llm_proj|llm_projection|t5_model|t5_proj|opt_model|opt_proj|itm_head|vision_proj|text_proj)\."
    r"|temp$|text_embeddings\."
)
_TEXT_BRANCH = re.compile(
    r"Qformer\.(cls|bert\.cls|bert\.embeddings\.(word|position)_embeddings|bert\.embeddings\.position_ids)"
    r"|Qformer\..*layer\.\d+\.(intermediate|output)\."
)


def own_names(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """`tensors` of the original under this program's names; those that have them already stay."""
    return {_renamed(name, _TO_OWN): tensor for name, tensor in tensors.items()}


def original_names(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Inverse of `own_names`."""
    return {_renamed(name, _TO_ORIGINAL): tensor for name, tensor in tensors.items()}


def is_elsewhere(name: str) -> bool:
    """Whether a tensor of BLIP-2's files belongs neither to the tower nor to the Q-Former."""
    return _ELSEWHERE.match(name) is not None


def is_text_branch(name: str) -> bool:
    """Whether a tensor belongs to the Q-Former's text branch."""
    return _TEXT_BRANCH.match(name) is not None


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name
