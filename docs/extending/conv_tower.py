"""A vision tower and a connector of one's own, in one file that a recipe names under `imports:`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lavis.extend import CONNECTORS, TOWERS, Connector, ConnectorConfig, Tower, TowerConfig, opt


@dataclass
class ConvConfig(TowerConfig):
    """Two strided convolutions; a vector for each 16 x 16 pixels."""

    channels: int = opt(32, "numbers of each vector", at_least=1)

    def span(self) -> int:
        return (self.image_size // 16) ** 2

    def width(self) -> int:
        return self.channels


@TOWERS.register("conv", config=ConvConfig)
class ConvTower(Tower):
    """[N, 3, S, S] -> [N, (S/16)^2, channels]."""

    def __init__(self, config: ConvConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.Sequential(
            nn.Conv2d(3, config.channels, 8, stride=8),
            nn.GELU(),
            nn.Conv2d(config.channels, config.channels, 2, stride=2),
        )

    def forward(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        return self.model(pixels_NCHW).flatten(2).transpose(1, 2)


@dataclass
class NormLinearConfig(ConnectorConfig):
    """LayerNorm and one linear layer."""

    def span(self, tokens: int) -> int:
        """As many as the tower gives."""
        return tokens


@CONNECTORS.register("norm_linear", config=NormLinearConfig)
class NormLinear(Connector):
    """[N, T, D_tower] -> [N, T, D_llm]."""

    def __init__(self, config: NormLinearConfig, tower_width: int, llm_width: int) -> None:
        super().__init__()
        self.config = config
        self.norm_linear = nn.Sequential(nn.LayerNorm(tower_width), nn.Linear(tower_width, llm_width))

    def project(self, encoded_NTD: torch.Tensor) -> torch.Tensor:
        return self.norm_linear(encoded_NTD)
