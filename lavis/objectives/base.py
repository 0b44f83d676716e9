"""The protocol of an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

import torch

from lavis.config.sections import ObjectiveConfig
from lavis.core.output import LossOutput
from lavis.core.types import Batch
from lavis.generation.decoding import Decoder


class Actors(Protocol):
    """Whom an objective asks before a step: a lavis.objectives.learner.Learner."""

    def ready(self, batch: Batch) -> Batch:
        """`batch` as the model is to be given it."""

    def decoder(self) -> Decoder:
        """What answers prompts, which went through `ready`."""


class Objective(ABC):
    """What a recipe trains for. It is written on hidden states and a scorer, never on a model: so the same loss is
    that of one process, of ZeRO and of a pipeline's last stage.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"conversation", "document"})
    """Kinds of rows it reads; others are refused."""
    generates: ClassVar[bool] = False
    """Whether the model answers prompts, so that test splits and sample prompts can be judged by generation."""
    parts: ClassVar[tuple[str, ...]] = ()
    """Names of the parts that its LossOutput always has."""

    @classmethod
    def from_config(cls, config: ObjectiveConfig) -> Objective:
        """The objective of a recipe's section. One with settings of its own is registered with their dataclass
        (`OBJECTIVES.register(name, config=...)`), a subclass of ObjectiveConfig, and reads them here.
        """
        return cls()

    @abstractmethod
    def units(self, batch: Batch) -> int:
        """By how many units the loss sum of `batch` is to be divided."""

    @abstractmethod
    def loss(self, scorer: Any, hidden: torch.Tensor, batch: Batch) -> LossOutput:
        """Sums over the units of `batch`.

        hidden: what the model's `hidden` gives, [B, L, D] for an LLM. scorer: the model's head, for an LLM a
        lavis.models.scoring.Scorer. Ask it for the positions that count, and equally often for any batch: where ranks
        share weights they call it together.
        """

    def before_step(self, batches: list[Batch], actors: Actors) -> list[Batch]:
        """The micro-batches of an optimiser step as the loss is given them: where the model's own answers are what it
        learns from, they are made here.
        """
        return batches
