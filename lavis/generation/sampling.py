"""The next token of one answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lavis.generation.settings import GenerationSettings


class Chooser:
    """Chooses tokens as `settings` say.

    Draws come from a generator of its own, so they do not depend on what else is answered.
    """

    def __init__(self, settings: GenerationSettings, seed: int, ids: Sequence[int]) -> None:
        self.processors, self.generator, self.ids = LogitsProcessorList(), None, list(ids)
        s = settings
        if s.repetition_penalty != 1:
            self.processors.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
        if not s.do_sample:
            return
        self.generator = torch.Generator().manual_seed(seed)
        if s.temperature != 1:
            self.processors.append(TemperatureLogitsWarper(s.temperature))
        if s.top_k:
            self.processors.append(TopKLogitsWarper(s.top_k))
        if s.top_p < 1:
            self.processors.append(TopPLogitsWarper(s.top_p))

    @property
    def plain(self) -> bool:
        """Whether it takes the likeliest token as it is."""
        return self.generator is None and not self.processors

    def __call__(self, logits: torch.Tensor) -> int:
        """The token for fp32 logits [V]."""
        scores = logits
        if self.processors:
            seen = cast(torch.LongTensor, torch.tensor([self.ids], dtype=torch.long, device=logits.device))
            scores = self.processors(seen, cast(torch.FloatTensor, logits[None]))[0]
        if self.generator is None:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1).cpu(), 1, generator=self.generator))
