"""The EVA ViT of BLIP-2 and MiniGPT4Qwen: timm's, without a last norm."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva
from torch import nn

from lavis.core.registries import TOWERS
from lavis.models.part_configs import EvaConfig
from lavis.models.towers.base import Tower
from lavis.weights.tensors import LoadReport, load_tensors, read_tensors

_PREFIX = "visual_encoder."
_REST = re.compile(r"visual_encoder\.(norm|fc_norm|head)\.")
_BLOCK = re.compile(r"visual_encoder\.blocks\.(\d+)\.")
_POSITIONS = "visual_encoder.pos_embed"


@TOWERS.register("eva_clip_g")
class EvaTower(Tower):
    """The class token's vector, then one for each patch."""

    config: EvaConfig
    model: Any  # an Eva, of whose blocks no type is known

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _build(config)

    def forward(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        return self.model.forward_features(pixels_NCHW)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.patch_embed.proj.weight.dtype

    def freeze(self) -> None:
        """See Part; the positions may be trained alone."""
        super().freeze()
        if self.config.train_positions:
            self.model.pos_embed.requires_grad_(True)

    def adapt(self) -> None:
        if self.config.train == "lora":
            for block in self.model.blocks:
                block.attn.qkv_bias_separate = True  # else timm takes the weight of `qkv` and passes an adapter by
        super().adapt()

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Cast Linear and Conv weights to `dtype`; norms, q/v biases, positions and class token stay fp32."""
        for module in self.model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(dtype)

    def layers(self) -> Iterator[nn.Module]:
        return iter(self.model.blocks)

    def unhooked_parameters(self) -> list[nn.Parameter]:
        """See Part: forward_features is called, not the ViT."""
        return list(self.model.parameters(recurse=False))

    def borrowed_parameters(self) -> list[tuple[nn.Module, nn.Parameter]]:
        attentions = [block.attn for block in self.model.blocks]
        return [(attention, attention.qkv.weight) for attention in attentions if not attention.qkv_bias_separate]

    def load(self, source: str) -> LoadReport:
        """From a file of the ViT alone (bare names; blocks beyond the model's, the last norm and the head are left out)
        or of a tower and a Q-Former (names that begin with visual_encoder; the others are the connector's).
        """
        tensors = read_tensors(source)
        alone = not any(name.startswith(_PREFIX) for name in tensors)
        if alone:
            tensors = {_PREFIX + name: tensor for name, tensor in tensors.items()}
        fitted = self.fit(tensors)
        report = load_tensors(
            self.model,
            fitted,
            file=source,
            wanted=lambda name: True,
            ignored=self._is_beyond if alone else lambda name: not name.startswith(_PREFIX),
            prefix=_PREFIX,
            resized=[name for name in tensors if fitted[name] is not tensors[name]],
        )
        self.complete()
        return report

    def complete(self) -> None:
        for attention in (block.attn for block in self.model.blocks):  # the one thing that is in no file: always zero
            attention.k_bias = torch.zeros_like(attention.k_bias, device=attention.qkv.weight.device)

    def _is_beyond(self, name: str) -> bool:
        block = _BLOCK.match(name)
        return int(block[1]) >= len(self.model.blocks) if block else _REST.match(name) is not None

    def fit(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A position embedding [1, 1 + g*g, D] of another grid is resized (bicubic, the class position as it is)."""
        own, given = self.model.pos_embed, tensors.get(_POSITIONS)
        if given is None or own.shape == given.shape or own.shape[-1] != given.shape[-1]:
            return dict(tensors)
        side = round((own.shape[1] - 1) ** 0.5)
        return {**tensors, _POSITIONS: resample_abs_pos_embed(given, [side, side], antialias=False)}


def _build(config: EvaConfig) -> Eva:
    vit = Eva(
        img_size=config.image_size,
        num_classes=0,
        global_pool="",
        drop_path_rate=config.drop_path_rate,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
    )
    vit.norm = nn.Identity()
    for linear in (m for m in vit.blocks.modules() if isinstance(m, nn.Linear)):
        nn.init.trunc_normal_(linear.weight, std=config.init_std)
    for positions in (vit.pos_embed, vit.cls_token):
        assert positions is not None
        nn.init.trunc_normal_(positions, std=config.pos_init_std)
    vit.set_grad_checkpointing(config.recompute and config.train != "frozen")
    return vit
