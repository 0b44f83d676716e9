"""A Vlm of EVA tower and Q-Former, and transformers' Blip2ForConditionalGeneration: the same function.

One number differs: transformers gives the LayerNorm behind the ViT (`ln_vision` here, `post_layernorm` there) the eps
of the ViT's blocks, 1e-6, where LAVIS and this program have 1e-5. docs/export.md says what that amounts to.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration

from lavis.core.errors import CheckpointError
from lavis.core.registries import HF_MODELS
from lavis.models.configs import VlmConfig
from lavis.models.hf.pictures import media_of
from lavis.models.part_configs import EvaConfig, QFormerConfig, QFormerLinearConfig
from lavis.models.parts import LlmConfig
from lavis.weights.blip2_names import blip2_tensors, own_tensors

if TYPE_CHECKING:
    from lavis.models.vlm import Vlm

MODEL_TYPE = Blip2Config.model_type


def blip2_config(model: Vlm, stop_token_ids: Sequence[int], pad_token_id: int) -> Blip2Config:
    """The configuration of `model` as transformers' class.

    The ids go into the LLM's part: stock generation reads them there and not in generation_config.json.
    """
    tower: Any = model.config.tower
    qformer: Any = model.connector
    vit: Any = model.get_submodule("visual_encoder.model")
    text = copy.deepcopy(model.llm_model.config)
    text.name_or_path = ""  # a folder of this machine
    vars(text).pop("quantization_config", None)  # of the file it was read from; the weights are whole here
    text.eos_token_id, text.pad_token_id = list(stop_token_ids), pad_token_id
    vision = {
        "hidden_size": tower.embed_dim,
        "intermediate_size": vit.blocks[0].mlp.fc1.out_features,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.num_heads,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "layer_norm_eps": 1e-6,
    }
    return Blip2Config(
        vision_config=vision,
        qformer_config=qformer.Qformer.config.to_dict(),
        text_config=text,
        num_query_tokens=qformer.config.num_query_token,
        image_token_index=model.image_token_id,
    )


def as_blip2(model: Vlm, config: Blip2Config) -> Blip2ForConditionalGeneration:
    """A Blip2ForConditionalGeneration that shares the tensors of `model`, for saving.

    It can't be run: buffers that are not saved are on the meta device. LoRA adapters must have been merged.
    """
    with torch.device("meta"):
        blip2 = Blip2ForConditionalGeneration(config)
    blip2.load_state_dict(blip2_tensors(model.state_dict()), assign=True)
    blip2.tie_weights()
    return blip2


def own_config(values: Mapping[str, Any], where: str) -> VlmConfig:
    """The `model` section that describes the config.json `values` of a Blip2ForConditionalGeneration; nothing in it
    names a weight file.

    Raises CheckpointError when it is a model that this program's can't equal.
    """
    config = Blip2Config.from_dict(dict(values))
    v: Any = config.vision_config
    q: Any = config.qformer_config
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
            f"{where}: this BLIP-2 model has parts that Vlm lacks: {'; '.join(wrong)}. Choose another one."
        )
    # Half a neuron more than the whole number, since timm takes width * mlp_ratio and drops the fraction.
    ratio = (v.intermediate_size + 0.5) / v.hidden_size
    return VlmConfig(
        tower=EvaConfig(
            image_size=v.image_size,
            patch_size=v.patch_size,
            embed_dim=v.hidden_size,
            depth=v.num_hidden_layers,
            num_heads=v.num_attention_heads,
            mlp_ratio=ratio,
        ),
        connector=QFormerLinearConfig(
            num_query_token=config.num_query_tokens,
            qformer=QFormerConfig(
                hidden_size=q.hidden_size,
                num_hidden_layers=q.num_hidden_layers,
                num_attention_heads=q.num_attention_heads,
                intermediate_size=q.intermediate_size,
                cross_attention_frequency=q.cross_attention_frequency,
                dropout=q.hidden_dropout_prob,
            ),
        ),
        llm=LlmConfig(weights=where),
        media=media_of(Path(where), "minigpt4qwen"),
    )


@HF_MODELS.register(MODEL_TYPE)
class Blip2Folder:
    """A folder of transformers' class, read as a Vlm."""

    config = staticmethod(own_config)

    @staticmethod
    def tensors(tensors: Mapping[str, torch.Tensor], _: VlmConfig) -> dict[str, torch.Tensor]:
        """By public names."""
        return own_tensors(tensors)

    @staticmethod
    def image_token_id(values: Mapping[str, Any]) -> int:
        """Id of the placeholder."""
        return values["image_token_index"]
