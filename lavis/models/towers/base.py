"""What a vision tower is."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lavis.models.adapters import add_lora
from lavis.models.part import Part
from lavis.models.parts import TowerConfig


class Tower(Part, ABC):
    """[N, 3, S, S] pixels -> [N, config.span(), config.width()] vectors.

    All its tensors are in `self.model`, a module of a library or of its own; checkpoints call them
    `visual_encoder.<name inside model>`.
    """

    config: TowerConfig
    model: nn.Module

    @classmethod
    def from_config(cls, config: Any) -> Tower:
        """The tower of its section, with random weights (on the meta device where that is the default device)."""
        return cls(config)

    @abstractmethod
    def forward(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """See the class."""

    def encode(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """As forward, in the type of its weights, without a graph where it is frozen; the result is fp32."""
        own = self.dtype
        cast = contextlib.nullcontext() if own == torch.float32 else torch.autocast(pixels_NCHW.device.type, own)
        with contextlib.nullcontext() if self.trained else torch.no_grad(), cast:
            return self(pixels_NCHW).float()

    @property
    def dtype(self) -> torch.dtype:
        """Type of its matrices."""
        # not by the shapes of parameters: ZeRO-3 takes these away
        return next(m.weight.dtype for m in self.model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))

    def adapt(self) -> None:
        if self.config.train == "lora":
            add_lora(self.model, self.config.lora, "visual_encoder.{}".format)

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Put weights that are never trained into `dtype`."""
        self.model.to(dtype)

    def rate_scales(self, layer_decay: float) -> dict[nn.Parameter, float]:
        """See Part. What lies below the lowest layer is one layer further down."""
        own, layers = self.config.lr_scale, list(self.layers())
        if not layers:
            return super().rate_scales(layer_decay)
        scales = dict.fromkeys(self.parameters(), own * layer_decay ** (len(layers) + 1))
        for i, layer in enumerate(layers):
            scales |= dict.fromkeys(layer.parameters(), own * layer_decay ** (len(layers) - i))
        return scales

    def layers(self) -> Iterator[nn.Module]:
        """Its blocks from the bottom up, for layer-wise learning rates; none if it has no such order."""
        return iter(())
