"""A model together with what it learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lavis.core.dist import World
from lavis.core.output import LossOutput
from lavis.core.types import Batch
from lavis.generation.decoding import Decoder, LocalDecoder
from lavis.objectives.base import Objective


class Learner(nn.Module):
    """`model` under `objective` as they lie on this rank: what is trained, validated and asked.

    world: the ranks over which samples are split.
    """

    in_step: bool = False
    """Whether ranks must run the same modules at the same time, because each holds a part of the weights."""

    def __init__(self, model: nn.Module, objective: Objective, world: World) -> None:
        super().__init__()
        self.model: Any = model
        self.objective, self.world = objective, world

    def forward(self, batch: Batch) -> LossOutput:
        """The objective's loss on a batch that `ready` gave."""
        # The model's own forward, and not `hidden`: what splits weights over ranks hooks into calls of modules.
        return self.objective.loss(self.scorer(), self.model(batch), batch)

    def scorer(self) -> Any:
        return self.model.scorer()

    def ready(self, batch: Batch) -> Batch:
        """`batch` on this rank's device, as the model is to be given it.

        Where `in_step`, all ranks call this together.
        """
        return batch.to(self.world.device)

    def decoder(self) -> Decoder:
        """A new decoder; its prompts go through `ready`."""
        return LocalDecoder(self.model)

    def image_encoder(self) -> Any:
        """What encodes images on this rank, if any part of it does."""
        return self.model

    def tensors(self) -> Mapping[str, nn.Parameter]:
        """The parameters of this rank under the names they have in the whole model."""
        return dict(self.model.named_parameters())
