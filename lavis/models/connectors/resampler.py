"""A Perceiver-like resampler: learned queries instead of one vector for each patch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lavis.core.errors import ConfigError
from lavis.core.registries import CONNECTORS
from lavis.models.connector_configs import ResamplerConfig
from lavis.models.connectors.base import Connector


class CrossAttention(nn.Module):
    """Multi-head attention of queries over vectors. Its layers are called, never read, so that adapters fit on them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, queries_NQD: torch.Tensor, vectors_NTD: torch.Tensor) -> torch.Tensor:
        """[N, Q, D]."""
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q, queries_NQD), (self.k, vectors_NTD), (self.v, vectors_NTD))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ResamplerBlock(nn.Module):
    """Cross-attention from queries to vectors and an MLP, both behind a norm and around a residual."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm_queries, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CrossAttention(width, heads)
        hidden = round(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, queries_NQD: torch.Tensor, vectors_NTD: torch.Tensor) -> torch.Tensor:
        """[N, Q, D]."""
        queries = queries_NQD + self.attention(self.norm_queries(queries_NQD), vectors_NTD)
        return queries + self.mlp(self.norm_mlp(queries))


@CONNECTORS.register("resampler")
class Resampler(Connector):
    """`queries` look at the projected vectors of the tower in `blocks`; `llm_proj` puts them in the LLM's space."""

    config: ResamplerConfig

    def __init__(self, config: ResamplerConfig, tower_width: int, llm_width: int) -> None:
        super().__init__()
        width = config.width or llm_width
        if width % config.heads:
            raise ConfigError(
                f"model.connector: a resampler of width {width} cannot have {config.heads} heads. Set width or heads."
            )
        self.config = config
        self.queries = nn.Parameter(torch.empty(1, config.queries, width))
        nn.init.trunc_normal_(self.queries, std=0.02)
        self.vectors_in, self.norm_vectors = nn.Linear(tower_width, width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(ResamplerBlock(width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm_out, self.llm_proj = nn.LayerNorm(width), nn.Linear(width, llm_width)

    def project(self, encoded_NTD: torch.Tensor) -> torch.Tensor:
        vectors = self.norm_vectors(self.vectors_in(encoded_NTD))
        queries = self.queries.expand(len(vectors), -1, -1)
        for block in self.blocks:
            queries = block(queries, vectors)
        return self.llm_proj(self.norm_out(queries))
