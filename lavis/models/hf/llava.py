"""LlavaForConditionalGeneration: a vision model of transformers, an MLP of two layers, and a chat LLM."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from lavis.core.errors import CheckpointError
from lavis.core.registries import HF_MODELS, TOWERS
from lavis.models.configs import VlmConfig
from lavis.models.connector_configs import MlpConfig
from lavis.models.hf.pictures import media_of
from lavis.models.parts import LlmConfig
from lavis.models.tower_configs import FAMILIES, HfVisionConfig

if TYPE_CHECKING:
    from lavis.models.vlm import Vlm

MODEL_TYPE = "llava"
_MOST_TOKENS = 2048
"""What LLaVA-1.5 was trained with; its LLM reads more."""
# three layouts: the hub's, and those that transformers 4.52 to 4.57 and 5 write
_NAMES = (
    (r"^(?:model\.)?multi_modal_projector\.linear_1\.", "mm_projector.0."),
    (r"^(?:model\.)?multi_modal_projector\.linear_2\.", "mm_projector.2."),
    (r"^(?:language_model\.model|model\.language_model)\.", "llm_model.model."),
    (r"^(?:language_model\.)?lm_head\.", "llm_model.lm_head."),
)
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
_TOWER = re.compile(r"^(?:model\.)?vision_tower\.")


def why_not(config: VlmConfig) -> str | None:
    """Why a model of this section cannot be a LlavaForConditionalGeneration; None if it can."""
    tower, connector = config.tower, config.connector
    if not isinstance(tower, HfVisionConfig):
        return "its tower is not a vision model of transformers"
    kind = tower.values()["model_type"]
    if kind == "siglip2_vision_model":
        return "LLaVA's class gives a tower pictures, not the patches that a SigLIP2 of any aspect ratio reads"
    if tower.final_norm and FAMILIES[kind].norm:
        return "LLaVA's class takes hidden states before the tower's final norm: set model.tower.final_norm=false"
    if tower.class_token == "drop" and _prefix(tower) > 1:
        return "LLaVA's class drops a class token but no registers: set model.tower.class_token=keep"
    if not isinstance(connector, MlpConfig) or connector.depth != 2:
        return "its connector is not an mlp of depth 2"
    return None if config.media.tiling == "none" else "LLaVA's class knows no tiles"


def to_stock(model: Vlm, stop_token_ids: Sequence[int], pad_token_id: int) -> LlavaForConditionalGeneration:
    """A LlavaForConditionalGeneration that shares the tensors of `model`, for saving.

    It cannot be run: buffers that are not saved are on the meta device. LoRA adapters must have been merged.
    """
    assert model.visual_encoder is not None and model.connector is not None
    with torch.device("meta"):
        stock = LlavaForConditionalGeneration(_stock_config(model, stop_token_ids, pad_token_id))
    tower = stock.model.vision_tower
    _share(tower, _unused(tower) | dict(model.visual_encoder.model.state_dict()))
    projector: Any = model.connector.mm_projector
    _share(stock.model.multi_modal_projector.linear_1, projector[0].state_dict())
    _share(stock.model.multi_modal_projector.linear_2, projector[2].state_dict())
    _share(stock.model.language_model, model.llm_model.base_model.state_dict())
    _share(stock.lm_head, model.llm_model.get_output_embeddings().state_dict())
    stock.tie_weights()
    return stock


def own_config(values: Mapping[str, Any], where: str) -> VlmConfig:
    """The `model` section that describes the config.json `values` in the folder `where`; no part names weight files.

    Raises CheckpointError when it is a model that this program's cannot equal.
    """
    config = LlavaConfig.from_dict(dict(values))
    layer: Any = config.vision_feature_layer
    vision: Any = config.vision_config
    prefix = FAMILIES[vision.model_type].prefix if vision.model_type in FAMILIES else None
    needed = [
        ("vision_config.model_type", prefix is not None, True),
        ("vision_feature_layer", isinstance(layer, int), True),
        ("projector_hidden_act", config.projector_hidden_act, "gelu"),
        ("multimodal_projector_bias", config.multimodal_projector_bias, True),
        ("vision_feature_select_strategy", config.vision_feature_select_strategy == "default" and prefix != 1, False),
    ]
    if wrong := [key for key, have, want in needed if have != want]:
        raise CheckpointError(
            f"{where}: this LLaVA has parts that cannot be read: {', '.join(f'{k}={values.get(k)!r}' for k in wrong)}."
        )
    keep = "drop" if config.vision_feature_select_strategy == "default" else "keep"
    tower = HfVisionConfig(name="hf_vision", config=vision.to_dict(), layer=layer, class_token=keep)
    stock_text: Any = config.text_config
    text = stock_text.to_dict()
    return VlmConfig(
        tower=tower,
        connector=MlpConfig(name="mlp"),
        llm=LlmConfig(config=text, tokenizer=where),
        # LLaVA was trained and evaluated on padded pictures, whatever the processors on the hub say
        media=media_of(Path(where), "llava", cropped="pad"),
        max_length=min(_MOST_TOKENS, text.get("max_position_embeddings", _MOST_TOKENS)),
        chat_template=_chat_template(Path(where)),
    )


def own_tensors(tensors: Mapping[str, torch.Tensor], config: VlmConfig) -> dict[str, torch.Tensor]:
    """A LLaVA's tensors by public names; of the tower, those that one of `config` has."""
    assert config.tower is not None
    with torch.device("meta"):
        tower: Any = TOWERS.get(config.tower.name).from_config(config.tower)
    visual = {_TOWER.sub("", name): tensor for name, tensor in tensors.items() if _TOWER.match(name)}
    named, left_out = tower.own_tensors(visual)
    own = {name: tensor for name, tensor in named.items() if name not in left_out}
    for name, tensor in tensors.items():
        if not _TOWER.match(name):
            for pattern, replacement in _NAMES:
                name = re.sub(pattern, replacement, name)
            own[name] = tensor
    return own


@HF_MODELS.register(MODEL_TYPE)
class LlavaFolder:
    """A folder of transformers' class, read as a Vlm."""

    config = staticmethod(own_config)
    tensors = staticmethod(own_tensors)

    @staticmethod
    def image_token_id(values: Mapping[str, Any]) -> int:
        """Id of the placeholder."""
        return values["image_token_index"]


def _stock_config(model: Vlm, stop_token_ids: Sequence[int], pad_token_id: int) -> LlavaConfig:
    """The ids go into the LLM's part: stock generation reads them there and not in generation_config.json."""
    text = copy.deepcopy(model.llm_model.config)
    text.name_or_path = ""  # a folder of this machine
    vars(text).pop("quantization_config", None)  # of the file it was read from; the weights are whole here
    text.eos_token_id, text.pad_token_id = list(stop_token_ids), pad_token_id
    assert model.visual_encoder is not None and model.image_token_id is not None
    vision: Any = copy.deepcopy(model.visual_encoder.model.config)
    vision.name_or_path = ""
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=model.image_token_id,
        image_seq_length=model.config.tokens_per_tile,
        vision_feature_layer=-1,  # the tower ends there
        vision_feature_select_strategy=selection(model.config)[0],
        tie_word_embeddings=text.tie_word_embeddings,
    )


def selection(config: VlmConfig) -> tuple[Literal["default", "full"], int]:
    """LLaVA's vision_feature_select_strategy, and how many vectors of the tower stand for no patch."""
    tower: Any = config.tower
    prefix = _prefix(tower)
    return "default" if tower.class_token == "drop" and prefix == 1 else "full", prefix


def _prefix(tower: HfVisionConfig) -> int:
    values = tower.values()
    prefix = FAMILIES[values["model_type"]].prefix
    return prefix + values.get("num_register_tokens", 0) if prefix else 0


def _unused(tower: nn.Module) -> dict[str, torch.Tensor]:
    """Values for tensors of a stock tower that have no effect on what LLaVA takes of it, and that ours lacks."""
    return {
        name: (torch.ones if name.endswith("norm.weight") else torch.zeros)(tensor.shape)
        for name, tensor in tower.state_dict().items()
    }


def _share(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    module.load_state_dict(tensors, assign=True)


def _chat_template(folder: Path) -> str | None:
    """Name of the template of a folder whose own one is missing, or takes contents in parts, as transformers' do."""
    found = [path.read_text(encoding="utf-8") for path in map(folder.joinpath, _TEMPLATES) if path.is_file()]
    text = "".join(found)
    if "lavis export hf" in text:
        return None
    if not text or "ASSISTANT:" in text:
        return "vicuna"
    return "chatml" if "<|im_start|>" in text else None
