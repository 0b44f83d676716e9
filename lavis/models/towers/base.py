"""What a vision tower is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import nn

from lavis.models.parts import TowerConfig


class Tower(nn.Module, ABC):
    """[N, 3, S, S] pixels -> [N, config.span(), config.width()] vectors.

    All its tensors are in `self.model`, a module of a library or of its own; checkpoints call them
    `visual_encoder.<name inside model>`.
    """

    config: TowerConfig
    model: nn.Module

    @classmethod
    @abstractmethod
    def from_config(cls, config: TowerConfig) -> Tower:
        """The tower with random weights (on the meta device where that is the default device)."""

    @abstractmethod
    def forward(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """See the class."""

    def load(self, source: str) -> None:
        """Fill `self.model` from the file or folder `source`. Raises CheckpointError naming what does not fit."""
        raise NotImplementedError(f"{type(self).__name__} reads no weight files")

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Put weights that are never trained into `dtype`."""
        self.model.to(dtype)

    def layers(self) -> Iterator[nn.Module]:
        """Its blocks from the bottom up, for layer-wise learning rates; none if it has no such order."""
        return iter(())
