"""What towers and connectors have in common: what is trained of them, and where their weights come from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lavis.models.adapters import add_lora
from lavis.models.parts import PartConfig
from lavis.weights.tensors import LoadReport


class Part(nn.Module):
    """A module with a section of the recipe. What is frozen of it stays in eval mode."""

    config: PartConfig

    def freeze(self) -> None:
        """Say what is trained, adapters aside."""
        self.requires_grad_(self.config.train == "full")

    def adapt(self) -> None:
        """Put on the LoRA adapters that the section asks for; once, when the weights they are for are there."""
        if self.config.train == "lora":
            add_lora(self, self.config.lora)

    @property
    def trained(self) -> bool:
        """Whether any tensor of it is trained."""
        return any(p.requires_grad for p in self.parameters())

    def train(self, mode: bool = True) -> Part:
        """As nn.Module.train, but a frozen part stays in eval mode (no dropout, no stochastic depth)."""
        super().train(mode and self.trained)
        return self

    def rate_scales(self, layer_decay: float) -> dict[nn.Parameter, float]:
        """Parameter to the factor on its learning rate; layer_decay: per layer from the top down, if it has layers."""
        return dict.fromkeys(self.parameters(), self.config.lr_scale)

    def load(self, source: str) -> LoadReport:
        """Fill it from the file or folder `source`; its tensors may be on the meta device before.

        Afterwards no buffer is on the meta device; parameters that the file does not bring may be. Raises
        CheckpointError naming what does not fit.
        """
        raise NotImplementedError(f"{type(self).__name__} reads no weight files")

    def complete(self) -> None:
        """Give buffers that no file holds their values, where they were made on the meta device."""

    def fit(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`tensors` of such a part, by the names that checkpoints use, made to fit this one (another image size)."""
        return dict(tensors)

    def unhooked_parameters(self) -> list[nn.Parameter]:
        """Parameters used outside a call of the module that owns them."""
        return list(self.parameters(recurse=False))

    def borrowed_parameters(self) -> list[tuple[nn.Module, nn.Parameter]]:
        """(module, parameter of a part of it) where a forward reads a weight itself instead of calling its owner: what
        splits weights over ranks must know.
        """
        return []
