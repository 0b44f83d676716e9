"""Sections of the connectors that are plain modules. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

from lavis.config.schema import opt
from lavis.core.errors import ConfigError
from lavis.models.parts import ConnectorConfig


@dataclass
class LinearConfig(ConnectorConfig):
    """One linear layer, the same for every vector."""

    def span(self, tokens: int) -> int:
        return tokens


@dataclass
class MlpConfig(ConnectorConfig):
    """Linear layers with GELU between them, the same for every vector; as LLaVA-1.5."""

    depth: int = opt(2, "linear layers", at_least=1)

    def span(self, tokens: int) -> int:
        return tokens


@dataclass
class PixelShuffleConfig(ConnectorConfig):
    """Squares of neighbouring vectors become one, then LayerNorm and an MLP; as InternVL."""

    factor: int = opt(2, "side of the square of vectors that become one", at_least=1)

    def span(self, tokens: int) -> int:
        side = math.isqrt(tokens)
        if side * side != tokens or side % self.factor:
            raise ConfigError(
                f"model.connector pixel_shuffle: {tokens} vectors are no square grid whose side {self.factor} divides. "
                "Choose another factor or image_size; a class token is left out by model.tower.class_token: drop."
            )
        return tokens // self.factor**2


@dataclass
class ResamplerConfig(ConnectorConfig):
    """Learned queries look at all vectors of a picture by cross-attention; as Perceiver and Qwen-VL."""

    queries: int = opt(64, "vectors a picture becomes", at_least=1)
    depth: int = opt(2, "blocks of cross-attention and MLP", at_least=1)
    width: Optional[int] = opt(None, "width of the blocks; null = that of the LLM", at_least=1)
    heads: int = opt(8, "attention heads", at_least=1)
    mlp_ratio: float = opt(4.0, "hidden width of the MLP / width")

    def span(self, tokens: int) -> int:
        return self.queries

    def problems(self, key: str) -> Iterator[str]:
        if self.width and self.width % self.heads:
            yield f"{key}.width is {self.width}, which is no multiple of the {self.heads} heads."
