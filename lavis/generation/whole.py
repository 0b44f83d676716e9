"""transformers' own generate: for beams, and for LLMs whose memory can't be cut into rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import takewhile
from typing import Any, cast

import torch
from transformers import LogitsProcessor, PreTrainedModel, RepetitionPenaltyLogitsProcessor, StoppingCriteria

from lavis.core.errors import DataError
from lavis.generation.cache import left_padded
from lavis.generation.settings import GenerationSettings
from lavis.models.llm import context_length


@torch.inference_mode()
def generate_whole(
    llm: PreTrainedModel,
    inputs_embeds: torch.Tensor,
    lengths: Sequence[int],
    stop_token_ids: Collection[int],
    pad_token_id: int,
    settings: GenerationSettings,
    *,
    prompt_ids: Sequence[int] = (),
    until: Callable[[], bool] | None = None,
    **more: Any,
) -> list[list[int]]:
    """Continue right-padded prompts: the new ids of each row, without the stop token.

    inputs_embeds: [B, L, D]; lengths: true length of each row. prompt_ids: tokens before the answers that the
    repetition penalty counts too. until: ends all answers when it holds. `more` goes to transformers' generate.
    Raises DataError for a prompt that fills the context.
    """
    s, longest = settings, max(lengths)
    room = context_length(llm) - longest
    if room < 1:
        raise DataError(
            f"a prompt of {longest} tokens leaves no room for an answer: the LLM reads {context_length(llm)}. Shorten"
            " the conversation."
        )
    embeds = left_padded(inputs_embeds, lengths)
    places = torch.arange(longest, device=embeds.device)
    mask = torch.stack([places >= longest - n for n in lengths]).long()
    ids = cast(Any, llm).generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        eos_token_id=list(stop_token_ids),
        pad_token_id=pad_token_id,
        max_new_tokens=min(s.max_new_tokens, room),
        num_beams=s.num_beams,
        do_sample=s.do_sample,
        **{key: getattr(s, key) if s.do_sample else None for key in ("temperature", "top_p", "top_k")},
        repetition_penalty=1.0,  # transformers' own does not know the prompt where it is given embeddings
        logits_processor=[_Penalty(s.repetition_penalty, prompt_ids)] if s.repetition_penalty != 1 else [],
        stopping_criteria=[_When(until)] if until else [],
        **more,
    )
    return [list(takewhile(lambda t: t not in stop_token_ids, row)) for row in ids.tolist()]


class _Penalty(LogitsProcessor):
    """A repetition penalty that counts `prompt` too."""

    def __init__(self, penalty: float, prompt: Sequence[int]) -> None:
        self.penalise = RepetitionPenaltyLogitsProcessor(penalty)
        self.prompt = torch.tensor([list(prompt)], dtype=torch.long)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        prompt = self.prompt.to(input_ids.device).expand(len(input_ids), -1)
        return self.penalise(torch.cat([prompt, input_ids], 1), scores)


class _When(StoppingCriteria):
    """Ends generation when `condition` holds."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self.condition = condition

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.condition(), device=input_ids.device)
