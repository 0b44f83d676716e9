"""One linear layer from the tower to the LLM."""

from __future__ import annotations

import torch
from torch import nn

from lavis.core.registries import CONNECTORS
from lavis.models.connector_configs import LinearConfig
from lavis.models.connectors.base import Connector


@CONNECTORS.register("linear")
class LinearConnector(Connector):
    """`llm_proj`, called as MiniGPT4Qwen's."""

    config: LinearConfig

    def __init__(self, config: LinearConfig, tower_width: int, llm_width: int) -> None:
        super().__init__()
        self.config = config
        self.llm_proj = nn.Linear(tower_width, llm_width)

    def project(self, encoded_NTD: torch.Tensor) -> torch.Tensor:
        return self.llm_proj(encoded_NTD)
