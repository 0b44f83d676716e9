"""Names of transformers' Blip2ForConditionalGeneration: one adapter for reading, converting and writing."""

from __future__ import annotations

from collections.abc import Mapping

import torch

Tensors = dict[str, torch.Tensor]

_PARTS = {
    "query_tokens": "query_tokens",
    "ln_vision.": "vision_model.post_layernorm.",
    "Qformer.": "qformer.",
    "llm_proj.": "language_projection.",
    "llm_model.": "language_model.",
}
_VIT = "visual_encoder."
_VIT_PARTS = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "blocks.": "encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
}
"""Our names (LAVIS's and timm's) to transformers'."""


def blip2_tensors(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Tensors of a MiniGPT4Qwen under transformers' names; the q and v biases of the ViT become one qkv bias, with
    zeros for k.
    """
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith(_VIT) and name.endswith(".attn.q_bias"):
            parts = (tensor, torch.zeros_like(tensor), tensors[name.replace(".q_bias", ".v_bias")])
            name, tensor = name.replace(".q_bias", ".qkv.bias"), torch.cat(parts)
        elif name.startswith(_VIT) and name.endswith(".attn.v_bias"):
            continue
        renamed[_to_blip2(name)] = tensor
    return renamed


def own_tensors(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Tensors of a Blip2ForConditionalGeneration under our names."""
    renamed = {}
    for name, tensor in ((_from_blip2(name), tensor) for name, tensor in tensors.items()):
        if name.startswith(_VIT) and name.endswith(".qkv.bias"):
            # k's bias adds the same to all scores of a query, which softmax takes away again: leaving it out changes
            # nothing.
            # Clones: a window of a larger tensor can't be saved again.
            q, _, v = tensor.chunk(3)
            renamed[name.replace(".qkv.bias", ".q_bias")] = q.clone()
            renamed[name.replace(".qkv.bias", ".v_bias")] = v.clone()
        else:
            renamed[name] = tensor
    return renamed


def _to_blip2(name: str) -> str:
    if name.startswith(_VIT):
        name = name.removeprefix(_VIT)
        for ours, theirs in _VIT_PARTS.items():
            name = name.replace(ours, theirs)
        return f"vision_model.{name}"
    return next((theirs + name.removeprefix(ours) for ours, theirs in _PARTS.items() if name.startswith(ours)), name)


def _from_blip2(name: str) -> str:
    for ours, theirs in _PARTS.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    if name.startswith("vision_model."):
        name = name.removeprefix("vision_model.")
        for ours, theirs in _VIT_PARTS.items():
            name = name.replace(theirs, ours)
        return _VIT + name
    return name
