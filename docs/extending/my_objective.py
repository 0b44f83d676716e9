"""An objective of one's own: the focal loss (Lin et al. 2017), by which tokens that the model is sure of count less."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lavis.extend import OBJECTIVES, Batch, LossOutput, Objective, ObjectiveConfig, Scorer, opt


@dataclass
class FocalConfig(ObjectiveConfig):
    """Keys of the section `objective` beside its name."""

    gamma: float = opt(2.0, "how much less sure tokens count; 0 = all alike", at_least=0)


@OBJECTIVES.register("focal", config=FocalConfig)
class Focal(Objective):
    """-(1 - p)^gamma log p of each supervised token."""

    kinds = frozenset({"conversation"})  # of rows it reads; others are refused
    generates = True  # the model answers, so test entries and sample prompts work
    parts = ("cross_entropy",)  # written to the log beside the loss

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma

    @classmethod
    def from_config(cls, config: FocalConfig) -> Focal:
        """The objective of a recipe's section."""
        return cls(config.gamma)

    def units(self, batch: Batch) -> int:
        """Supervised tokens: by them, over the whole global step, the sum of `loss` is divided."""
        return batch.supervised_tokens

    def loss(self, scorer: Scorer, hidden: torch.Tensor, batch: Batch) -> LossOutput:
        """Sums over the batch. The hidden state at a position says what the next token is."""
        logprobs = scorer.logprobs(*batch.supervised(hidden))
        loss = -((1 - logprobs.exp()) ** self.gamma * logprobs).sum()
        return LossOutput(loss, self.units(batch), {"cross_entropy": -logprobs.detach().sum()})
