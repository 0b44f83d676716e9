"""BLIP-2's first stage: the Q-Former learns which image tokens matter by three losses against captions.

Contrastive (ITC), matching with hard negatives (ITM) and image-grounded generation (ITG), after Li et al. 2023,
section 3. Negatives come from the micro-batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lavis.core.output import LossOutput
from lavis.core.registries import OBJECTIVES
from lavis.core.types import IGNORE_INDEX, Batch
from lavis.models.blip2_qformer import Blip2QFormer
from lavis.objectives.base import Objective


@OBJECTIVES.register("blip2_stage1")
class Blip2Stage1(Objective):
    """The three losses over a batch's images, one caption each; means over images."""

    kinds = frozenset({"caption"})
    parts = ("itc", "itm", "itg")

    def units(self, batch: Batch) -> int:
        """Images, one caption each."""
        return batch.num_samples

    def loss(self, scorer: Blip2QFormer, hidden: torch.Tensor, batch: Batch) -> LossOutput:
        """See Objective; hidden: the tower's vectors of each image."""
        ids, n = batch.input_ids, len(hidden)
        assert n == len(ids), "one caption for each image"
        queries, logits = scorer.read_along(ids, hidden)
        itg = F.cross_entropy(logits.float().flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
        similarity = scorer.similarity(ids, queries)
        itc = contrastive(similarity)
        itm = matching(scorer, ids, hidden, similarity)
        c = scorer.config
        loss = c.itc_weight * itc + c.itm_weight * itm + c.itg_weight * itg
        parts = dict(zip(self.parts, (itc, itm, itg), strict=True))
        return LossOutput(loss * n, n, {k: v.detach() * n for k, v in parts.items()})


def contrastive(similarity: torch.Tensor) -> torch.Tensor:
    """Mean loss of finding each image's caption among all, and each caption's image; similarity: [B, B]."""
    targets = torch.arange(len(similarity), device=similarity.device)
    both = F.cross_entropy(similarity, targets, label_smoothing=0.1) + F.cross_entropy(
        similarity.T, targets, label_smoothing=0.1
    )
    return both / 2


def matching(scorer: Blip2QFormer, ids: torch.Tensor, tokens: torch.Tensor, similarity: torch.Tensor) -> torch.Tensor:
    """Mean loss of telling (image, its text) from (image, similar text) and (similar image, text)."""
    rows = len(tokens)
    if rows == 1:  # no negatives to be had
        return similarity.sum() * 0.0
    with torch.no_grad():
        weights = similarity.float().clone().fill_diagonal_(-torch.inf)
        hard_text, hard_image = drawn(F.softmax(weights, 1)), drawn(F.softmax(weights.T, 1))
    logits = scorer.match_logits(torch.cat([ids, ids[hard_text], ids]), torch.cat([tokens, tokens, tokens[hard_image]]))
    targets = torch.zeros(3 * rows, dtype=torch.long, device=ids.device)
    targets[:rows] = 1
    return F.cross_entropy(logits, targets)


def drawn(probabilities: torch.Tensor) -> torch.Tensor:
    """An index by each row's probabilities: what torch.multinomial draws, without its look at the values, for which a
    GPU would have to be waited for.
    """
    return (probabilities / torch.empty_like(probabilities).exponential_(1)).argmax(1)
