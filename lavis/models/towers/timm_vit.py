"""Any ViT of timm as a tower."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lavis.core.registries import TOWERS
from lavis.models.tower_configs import TimmConfig
from lavis.models.towers.base import Tower
from lavis.models.towers.timm_sizes import create
from lavis.weights.shards import read_source
from lavis.weights.tensors import LoadReport, load_tensors

PUBLIC = "visual_encoder."
"""What begins a tower's names in checkpoints."""


@TOWERS.register("timm")
class TimmVit(Tower):
    """The ViT up to the chosen block, whose output's patch vectors are the tower's. What lies behind is not built."""

    config: TimmConfig
    model: Any  # a ViT of any of timm's modules

    def __init__(self, config: TimmConfig) -> None:
        super().__init__()
        self.config = config
        self.model = create(config.model, config.image_size)
        self.model.prune_intermediate_layers([config.blocks() - 1], prune_norm=not config.final_norm, prune_head=True)
        self.model.set_grad_checkpointing(config.recompute and config.train != "frozen")

    def forward(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        [states] = self.model.forward_intermediates(
            pixels_NCHW,
            indices=[len(self.model.blocks) - 1],
            norm=self.config.final_norm,
            output_fmt="NLC",
            intermediates_only=True,
            return_prefix_tokens=self.config.class_token == "keep",
        )
        # with prefix tokens asked for, and there: (patches, prefix)
        return torch.cat(states[::-1], 1) if isinstance(states, tuple) else states

    def load(self, source: str) -> LoadReport:
        """From a weight file of timm, or a folder or hub name with its model.safetensors."""
        tensors = _filtered(read_source(source), self.model)
        report = load_tensors(
            self.model,
            {PUBLIC + name: tensor for name, tensor in tensors.items()},
            file=source,
            wanted=lambda name: True,
            ignored=lambda name: self._is_behind(name.removeprefix(PUBLIC)),
            prefix=PUBLIC,
        )
        self.complete()
        return report

    def layers(self) -> Iterator[nn.Module]:
        yield from self.model.blocks

    def complete(self) -> None:
        """Rotary tables and zeros are in no file. They are alike in all blocks, so a ViT of one block has them."""
        missing = {name for name, buffer in self.model.named_buffers() if buffer.is_meta}
        if missing:
            with torch.device("cpu"):
                values = dict(create(self.config.model, self.config.image_size, depth=1).named_buffers())
            for name in missing:
                module, _, last = name.rpartition(".")
                value = values[re.sub(r"^blocks\.\d+\.", "blocks.0.", name)]
                setattr(self.model.get_submodule(module), last, value.clone())

    def fit(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Position embeddings of another picture size are resized as timm does it."""
        inside = {name.removeprefix(PUBLIC): t for name, t in tensors.items() if name == f"{PUBLIC}pos_embed"}
        return dict(tensors) | {PUBLIC + name: t for name, t in _filtered(inside, self.model).items()}

    def adapt(self) -> None:
        if self.config.train == "lora":
            for attention in self._fused_attentions():
                attention.qkv_bias_separate = True  # else timm takes the weight of `qkv` and passes an adapter by
        super().adapt()

    def borrowed_parameters(self) -> list[tuple[nn.Module, nn.Parameter]]:
        attentions = [attention for attention in self._fused_attentions() if not attention.qkv_bias_separate]
        return [(attention, attention.qkv.weight) for attention in attentions]

    def _fused_attentions(self) -> list[Any]:
        """Attention of EVA's kind, which adds biases of its own to a `qkv` without one."""
        return [m for m in self.model.modules() if getattr(m, "q_bias", None) is not None]

    def _is_behind(self, name: str) -> bool:
        block = re.match(r"blocks\.(\d+)\.", name)
        if block:
            return int(block[1]) >= len(self.model.blocks)
        return name.startswith(("norm.", "fc_norm.", "head", "attn_pool.", "pre_logits."))


def _filtered(tensors: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """`tensors` as timm's own loading turns them: older names, and positions resized to the model's grid."""
    module = sys.modules[type(model).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)  # most model files of timm have one
    return tensors if convert is None else convert(tensors, model)
