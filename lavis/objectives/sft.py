"""Next-token prediction: of answers in conversations (supervised fine-tuning), and of all tokens of documents."""

from __future__ import annotations

import torch

from lavis.core.output import LossOutput
from lavis.core.registries import OBJECTIVES
from lavis.core.types import Batch
from lavis.models.scoring import Scorer
from lavis.objectives.base import Objective


@OBJECTIVES.register("document")
@OBJECTIVES.register("sft")
class NextToken(Objective):
    """Cross-entropy at the supervised positions. Which these are is decided where a row becomes ids and labels, so
    conversations and documents differ in nothing here.
    """

    generates = True

    def units(self, batch: Batch) -> int:
        """Supervised tokens."""
        return batch.supervised_tokens

    def loss(self, scorer: Scorer, hidden: torch.Tensor, batch: Batch) -> LossOutput:
        """See Objective. Logits exist at supervised positions only."""
        return LossOutput(scorer.cross_entropy(*batch.supervised(hidden)), self.units(batch))
