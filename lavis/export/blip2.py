"""MiniGPT4Qwen and transformers' Blip2ForConditionalGeneration: the same function, its tensors under other names.

One number differs: transformers gives the LayerNorm behind the ViT (`ln_vision` here, `post_layernorm` there) the eps
of the
ViT's blocks, 1e-6, where LAVIS and this program have 1e-5. docs/export.md says what that amounts to.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration

from lavis.core.errors import CheckpointError
from lavis.models.configs import MiniGPT4QwenConfig, QFormerConfig, VitConfig

if TYPE_CHECKING:
    from lavis.models.minigpt4qwen import MiniGPT4Qwen

Tensors = dict[str, torch.Tensor]

MODEL_TYPE = Blip2Config.model_type
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
            renamed[name.replace(".qkv.bias", ".q_bias")], _, renamed[name.replace(".qkv.bias", ".v_bias")] = (
                tensor.chunk(3)
            )
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


def blip2_config(model: MiniGPT4Qwen, stop_token_ids: Sequence[int], pad_token_id: int) -> Blip2Config:
    """The configuration of `model` as transformers' class.

    The ids go into the LLM's part: stock generation reads them there and not in generation_config.json.
    """
    c, dimensions = model.config, model.config.vit_dimensions()
    text, vit = copy.deepcopy(model.llm_model.config), cast(Any, model.visual_encoder)
    text.name_or_path = ""  # a folder of this machine
    vars(text).pop("quantization_config", None)  # of the file it was read from; the weights are whole here
    text.eos_token_id, text.pad_token_id = list(stop_token_ids), pad_token_id
    vision = {
        "hidden_size": dimensions["embed_dim"],
        "intermediate_size": vit.blocks[0].mlp.fc1.out_features,
        "num_hidden_layers": dimensions["depth"],
        "num_attention_heads": dimensions["num_heads"],
        "image_size": c.image_size,
        "patch_size": dimensions["patch_size"],
        "layer_norm_eps": 1e-6,
    }
    return Blip2Config(
        vision_config=vision,
        qformer_config=model.Qformer.config.to_dict(),
        text_config=text,
        num_query_tokens=c.num_query_token,
        image_token_index=model.image_token_id,
    )


def as_blip2(model: MiniGPT4Qwen, config: Blip2Config) -> Blip2ForConditionalGeneration:
    """A Blip2ForConditionalGeneration that shares the tensors of `model`, for saving.

    It can't be run: buffers that are not saved are on the meta device. LoRA adapters must have been merged.
    """
    with torch.device("meta"):
        blip2 = Blip2ForConditionalGeneration(config)
    blip2.load_state_dict(blip2_tensors(model.state_dict()), assign=True)
    blip2.tie_weights()
    return blip2


def own_config(values: Mapping[str, Any], where: str) -> MiniGPT4QwenConfig:
    """The `model` section that describes the config.json `values` of a Blip2ForConditionalGeneration; nothing in it
    names a weight file.

    Raises CheckpointError when it is a model that this program's can't equal.
    """
    config = Blip2Config.from_dict(dict(values))
    v, q = cast(Any, config.vision_config), cast(Any, config.qformer_config)
    needed = [
        ("image_token_index", config.image_token_index is not None, True),
        ("vision_config.layer_norm_eps", v.layer_norm_eps, 1e-6),
        ("vision_config.hidden_act", v.hidden_act, "gelu"),
        ("vision_config.qkv_bias", v.qkv_bias, True),
        ("qformer_config.layer_norm_eps", q.layer_norm_eps, 1e-12),
        ("qformer_config.hidden_act", q.hidden_act, "gelu"),
        ("qformer_config.use_qformer_text_input", q.use_qformer_text_input, False),
        ("use_decoder_only_language_model", config.use_decoder_only_language_model, True),
    ]
    if wrong := [f"{key} is {have}, not {want}" for key, have, want in needed if have != want]:
        raise CheckpointError(
            f"{where}: this BLIP-2 model has parts that MiniGPT4Qwen lacks: {'; '.join(wrong)}. Choose another one."
        )
    # Half a neuron more than the whole number, since timm takes width * mlp_ratio and drops the fraction.
    ratio = (v.intermediate_size + 0.5) / v.hidden_size
    return MiniGPT4QwenConfig(
        vit=VitConfig(v.patch_size, v.hidden_size, v.num_hidden_layers, v.num_attention_heads, ratio),
        image_size=v.image_size,
        num_query_token=config.num_query_tokens,
        qformer=QFormerConfig(
            hidden_size=q.hidden_size,
            num_hidden_layers=q.num_hidden_layers,
            num_attention_heads=q.num_attention_heads,
            intermediate_size=q.intermediate_size,
            cross_attention_frequency=q.cross_attention_frequency,
            dropout=q.hidden_dropout_prob,
        ),
        load_pretrained=False,
        llm_model=where,
    )
