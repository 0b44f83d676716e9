"""LLaVA-1.5's connector."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from torch import nn

from lavis.core.registries import CONNECTORS
from lavis.models.connector_configs import MlpConfig
from lavis.models.connectors.base import Connector


@CONNECTORS.register("mlp")
class MlpConnector(Connector):
    """`mm_projector`, an nn.Sequential called as in LLaVA's own checkpoints."""

    config: MlpConfig

    def __init__(self, config: MlpConfig, tower_width: int, llm_width: int) -> None:
        super().__init__()
        self.config = config
        further = chain.from_iterable((nn.GELU(), nn.Linear(llm_width, llm_width)) for _ in range(config.depth - 1))
        self.mm_projector = nn.Sequential(nn.Linear(tower_width, llm_width), *further)

    def project(self, encoded_NTD: torch.Tensor) -> torch.Tensor:
        return self.mm_projector(encoded_NTD)

    def own_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Also LLaVA's mm_projector.bin, whose names begin with `model.`."""
        return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
