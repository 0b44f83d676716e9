"""InternVL's connector."""

from __future__ import annotations

import math

import torch
from torch import nn

from lavis.core.registries import CONNECTORS
from lavis.models.connector_configs import PixelShuffleConfig
from lavis.models.connectors.base import Connector


@CONNECTORS.register("pixel_shuffle")
class PixelShuffleConnector(Connector):
    """`mlp1`, an nn.Sequential called as in InternVL's own checkpoints, over squares of vectors."""

    config: PixelShuffleConfig

    def __init__(self, config: PixelShuffleConfig, tower_width: int, llm_width: int) -> None:
        super().__init__()
        self.config = config
        width = tower_width * config.factor**2
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width)
        )

    def project(self, encoded_NTD: torch.Tensor) -> torch.Tensor:
        return self.mlp1(shuffled(encoded_NTD, self.config.factor))


def shuffled(vectors_NTD: torch.Tensor, factor: int) -> torch.Tensor:
    """[N, H*W, D] -> [N, (H/f)*(W/f), f*f*D]: each f x f square of a square grid as one vector, its rows one by one."""
    side = math.isqrt(vectors_NTD.shape[1]) // factor
    grid = vectors_NTD.unflatten(1, (side, factor, side, factor))
    return grid.transpose(2, 3).flatten(3, 5).flatten(1, 2)
