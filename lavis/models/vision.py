"""The vision tower of BLIP-2: EVA ViT (timm), ln_vision, learned queries and Q-Former (transformers)."""

from __future__ import annotations

import contextlib

import torch
from timm.models.eva import Eva
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from lavis.models.configs import VisionConfig


def build_vit(config: VisionConfig) -> Eva:
    """timm's EVA ViT with `config`'s dimensions: [N, 3, S, S] -> forward_features -> [N, 1 + (S/P)^2, D], no final
    norm, no head.
    """
    dimensions = config.vit_dimensions()
    init_std, pos_init_std = dimensions.pop("init_std"), dimensions.pop("pos_init_std")
    vit = Eva(
        img_size=config.image_size,
        num_classes=0,
        global_pool="",
        drop_path_rate=config.drop_path_rate,
        **dimensions,
    )
    vit.norm = nn.Identity()
    for linear in (m for m in vit.blocks.modules() if isinstance(m, nn.Linear)):
        nn.init.trunc_normal_(linear.weight, std=init_std)
    for positions in (vit.pos_embed, vit.cls_token):
        nn.init.trunc_normal_(positions, std=pos_init_std)
    vit.set_grad_checkpointing(config.use_grad_checkpoint and not config.freeze_vit)
    return vit


def build_qformer(config: VisionConfig, encoder_width: int, *, text_vocab_size: int | None = None) -> Blip2QFormerModel:
    """transformers' Q-Former over `encoder_width`-wide image tokens; with its text branch if a vocabulary size is
    given.
    """
    c = config.qformer
    return Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=c.hidden_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            intermediate_size=c.intermediate_size,
            cross_attention_frequency=c.cross_attention_frequency,
            hidden_dropout_prob=c.dropout,
            attention_probs_dropout_prob=c.dropout,
            encoder_hidden_size=encoder_width,
            initializer_range=c.init_std,
            max_position_embeddings=c.max_position_embeddings,
            use_qformer_text_input=text_vocab_size is not None,
            vocab_size=text_vocab_size or 30522,
        )
    )


class Blip2Base(nn.Module):
    """Base of the models that see. Parts that are frozen stay in eval mode and build no graph.

    Submodule names are the original's: visual_encoder, ln_vision, query_tokens, Qformer. `on_meta` makes them without
    values.
    """

    def __init__(self, config: VisionConfig, *, text_vocab_size: int | None = None, on_meta: bool = False) -> None:
        super().__init__()
        self.config = config
        # no time and memory for values that a file brings
        with torch.device("meta") if on_meta else contextlib.nullcontext():
            self.visual_encoder = build_vit(config)
            width = self.visual_encoder.embed_dim
            self.ln_vision = nn.LayerNorm(width, eps=1e-5)
            self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_token, config.qformer.hidden_size))
            nn.init.normal_(self.query_tokens, std=0.02)
            self.Qformer = build_qformer(config, width, text_vocab_size=text_vocab_size)
        self.vit_trained = not config.freeze_vit
        self.qformer_trained = not config.freeze_qformer
        self._freeze()

    def _freeze(self) -> None:
        self.visual_encoder.requires_grad_(self.vit_trained)
        if self.config.unfreeze_pos_embed:
            self.visual_encoder.pos_embed.requires_grad_(True)
            self.vit_trained = True
        self.ln_vision.requires_grad_(self.qformer_trained)
        self.Qformer.requires_grad_(self.qformer_trained)
        self.query_tokens.requires_grad_(not self.config.freeze_queries)

    @property
    def tower_frozen(self) -> bool:
        """Whether an image's query vectors can never change (so that they may be cached)."""
        return not (self.vit_trained or self.qformer_trained or self.query_tokens.requires_grad)

    def train(self, mode: bool = True) -> Blip2Base:
        """As nn.Module.train, but frozen parts stay in eval mode (no dropout, no stochastic depth)."""
        super().train(mode)
        self.visual_encoder.train(mode and self.vit_trained)
        self.ln_vision.train(mode and self.qformer_trained)
        self.Qformer.train(mode and self.qformer_trained)
        return self

    def borrowed_parameters(self) -> list[tuple[nn.Module, nn.Parameter]]:
        """(module, parameter of a part of it) where a forward reads a weight itself instead of calling the part: what
        splits weights over ranks must know.
        """
        attentions = [block.attn for block in self.visual_encoder.blocks]
        return [(attention, attention.qkv.weight) for attention in attentions if not attention.qkv_bias_separate]

    def cast_frozen_vit(self, dtype: torch.dtype) -> None:
        """Cast the frozen ViT's Linear and Conv weights to `dtype`; norms, q/v biases, positions and class token stay
        fp32.
        """
        for module in self.visual_encoder.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(dtype)

    def image_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """ViT and ln_vision: [N, 3, S, S] -> [N, 1 + (S/P)^2, D_vit] in fp32."""
        dtype = self.visual_encoder.patch_embed.proj.weight.dtype
        cast = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(pixel_values.device.type, dtype)
        with contextlib.nullcontext() if self.vit_trained else torch.no_grad(), cast:
            tokens = self.visual_encoder.forward_features(pixel_values)
        with torch.autocast(tokens.device.type, enabled=False):
            return self.ln_vision(tokens.float())

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The vectors an image becomes: [N, 3, S, S] -> [N, num_query_token, D_qformer]."""
        with torch.no_grad() if self.tower_frozen else contextlib.nullcontext():
            tokens = self.image_tokens(pixel_values)
            queries = self.query_tokens.expand(tokens.shape[0], -1, -1)
            return self.Qformer(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state


def tower_bytes(config: VisionConfig, vit_dtype: torch.dtype) -> int:
    """Memory of the frozen tower's weights on a GPU, its ViT in `vit_dtype`, and 1 GiB for what it computes."""
    tower = Blip2Base(config, on_meta=True)
    tower.cast_frozen_vit(vit_dtype)
    return sum(p.nbytes for p in tower.parameters()) + (1 << 30)
