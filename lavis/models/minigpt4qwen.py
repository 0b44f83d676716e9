"""MiniGPT4Qwen: a vision tower, one linear layer, a chat LLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lavis.core.output import LossOutput
from lavis.core.registries import MODELS
from lavis.core.types import Batch
from lavis.data.assemble import load_tokenizer
from lavis.models.configs import MiniGPT4QwenConfig
from lavis.models.llm import (
    DTYPES,
    add_lora,
    check_context,
    free_memory,
    frozen_dtype,
    generate,
    load_llm,
    recompute_activations,
    spread,
    supervised_loss,
)
from lavis.models.pretrained import load_model, save_model
from lavis.models.vision import Blip2Base, tower_bytes
from lavis.tokens.template import image_token_id
from lavis.weights.tensors import load_configured


@MODELS.register("minigpt4qwen")
class MiniGPT4Qwen(Blip2Base):
    """Images become `num_query_token` vectors in the LLM's embedding space, at the places of the image placeholders.

    Each part is frozen, trained in full, or trained through LoRA adapters, as the configuration says.
    `image_token_id` is the id of the placeholder in input_ids. Adapters are put on by `add_adapters`, once the weights
    are there.
    """

    logits_chunks: int | None = None
    """See lavis.models.llm.cross_entropy_sum."""

    def __init__(
        self, config: MiniGPT4QwenConfig, llm: PreTrainedModel, image_token_id: int, *, on_meta: bool = False
    ) -> None:
        super().__init__(config, on_meta=on_meta)
        self.image_token_id = image_token_id
        self.llm_model = llm
        width = llm.get_input_embeddings().weight.shape[1]
        self.llm_proj = nn.Linear(config.qformer.hidden_size, width)
        self.llm_trained = not config.freeze_llm
        llm.requires_grad_(self.llm_trained)
        self.llm_proj.requires_grad_(not config.freeze_proj)
        if config.recomputes_llm:
            recompute_activations(llm)

    @classmethod
    def from_config(
        cls,
        config: MiniGPT4QwenConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: torch.device | str = "cpu",
        llm_dtype: torch.dtype | Literal["auto"] | None = None,
    ) -> MiniGPT4Qwen:
        """The model with the weights its configuration names, in the precision that suits `device` (it stays on the
        CPU).

        llm_dtype: another type of the LLM's weights; `auto` is that of its files. Raises CheckpointError for a missing
        or wrong weight file.
        """
        tokenizer = tokenizer or load_tokenizer(config)
        dtype = llm_dtype or (frozen_dtype(device) if config.freeze_llm else torch.float32)
        free = _room_beside_tower(config, device) if config.llm_device_map == "auto" else None
        llm = load_llm(
            config.llm_model,
            dtype,
            device_map=config.llm_device_map,
            max_memory=free,
            quantization=config.llm_quantization,
        )
        check_context(llm, config.max_txt_len)
        model = cls(config, llm, image_token_id(tokenizer), on_meta=bool(config.load_pretrained and config.pretrained))
        load_configured(model, config, model.add_adapters)
        if torch.device(device).type == "cuda" and model.tower_frozen:
            model.cast_frozen_vit(DTYPES[config.vit_precision])
        return model

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: torch.device | str = "cpu", llm_dtype: torch.dtype | None = None
    ) -> MiniGPT4Qwen:
        """The model that `save_pretrained` or `lavis export hf` wrote, in eval mode, in the precision that suits
        `device` (it stays on the CPU).

        llm_dtype: another type of the LLM's weights. Raises CheckpointError when the folder holds something else, or
        not all of it.
        """
        model = load_model(cls, folder, frozen_dtype(device), llm_dtype)
        if torch.device(device).type == "cuda" and model.tower_frozen:
            model.cast_frozen_vit(DTYPES[model.config.vit_precision])
        return model

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str = "5GB") -> None:
        """Write the whole model to `folder`: configuration and safetensors files of at most `max_shard_size`.

        `from_pretrained` opens it.
        """
        save_model(self, folder, max_shard_size)

    def add_adapters(self) -> None:
        """Put on the LoRA adapters that the configuration asks for.

        Once, when the parts have the weights that the adapters are for.
        """
        config = self.config
        if not config.get_lora:
            return
        if "vit" in config.lora_parts:
            for block in self.visual_encoder.blocks:
                block.attn.qkv_bias_separate = True  # else timm takes the weight of `qkv` and passes an adapter by
        parts: dict[str, nn.Module] = {"llm": self.llm_model, "vit": self.visual_encoder, "qformer": self.Qformer}
        for part in config.lora_parts:
            add_lora(parts[part], r=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout)
        self.llm_trained |= "llm" in config.lora_parts
        self.vit_trained |= "vit" in config.lora_parts
        self.qformer_trained |= "qformer" in config.lora_parts

    def place_llm(self, llm_device_map: str, device: torch.device | str) -> None:
        """Leave the LLM on the CPU (`cpu`), or spread it over the devices that are there (`auto`), with room for the
        tower on `device`.

        `.to(device)` moves the other parts alone from now on.
        """
        self.config = replace(self.config, llm_device_map=llm_device_map)
        if llm_device_map == "auto":
            spread(self.llm_model, _room_beside_tower(self.config, device))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> MiniGPT4Qwen:
        """What `.to(device)` does, but an LLM that `llm_device_map` has placed stays where it is."""
        if self.config.llm_device_map is None:
            return super()._apply(fn, recurse)
        llm = self._modules.pop("llm_model")
        try:
            return super()._apply(fn, recurse)
        finally:
            self._modules["llm_model"] = llm

    def train(self, mode: bool = True) -> MiniGPT4Qwen:
        """As Blip2Base.train; a frozen LLM stays in eval mode unless its activations are recomputed (which needs train
        mode).
        """
        super().train(mode)
        self.llm_model.train(mode and (self.llm_trained or self.config.recomputes_llm))
        return self

    def embed(self, batch: Batch) -> torch.Tensor:
        """Input embeddings [B, L, D_llm]: the LLM's own, with each placeholder replaced by a projected query vector."""
        return self.embed_parts(batch.input_ids, batch.pixel_values if batch.features is None else batch.features)

    def embed_parts(self, input_ids: torch.Tensor, images: torch.Tensor | None) -> torch.Tensor:
        """As `embed`; images: pixel_values [N, 3, S, S] or features [N, Q, D] of the ids' placeholders, in reading
        order.
        """
        table = self.llm_model.get_input_embeddings()
        ids = input_ids.to(table.weight.device)
        places = ids == self.image_token_id
        # a placeholder that was added to the tokenizer has no row of its own
        embeds = table(ids.masked_fill(places, 0))
        if images is None:
            return embeds
        queries = self.encode_images(images) if images.ndim == 4 else images
        return embeds.masked_scatter(places.unsqueeze(-1), self.llm_proj(queries).to(embeds))

    def forward(self, batch: Batch) -> LossOutput:
        """Loss over the batch's supervised tokens."""
        loss_sum = supervised_loss(
            self.llm_model, self.embed(batch), batch.labels, batch.position_ids, self.logits_chunks
        )
        return LossOutput(loss_sum, batch.supervised_tokens)

    def generate(
        self, batch: Batch, stop_token_ids: Sequence[int], pad_token_id: int, **settings: Any
    ) -> list[list[int]]:
        """Continue the prompts of `batch`; see lavis.models.llm.generate."""
        with torch.inference_mode():
            embeds = self.embed(batch)
        return generate(self.llm_model, embeds, batch.lengths, stop_token_ids, pad_token_id, **settings)


def _room_beside_tower(config: MiniGPT4QwenConfig, device: torch.device | str) -> dict[int | str, int]:
    """What the LLM may take of each device when the vision tower is on `device`."""
    return free_memory(tower_bytes(config, DTYPES[config.vit_precision]), torch.device(device).index or 0)
