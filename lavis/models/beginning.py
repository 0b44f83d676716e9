"""The tokens that every sample begins with, read once by a frozen LLM instead of in every sample of every step."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from lavis.models.attention import Samples, attending


@dataclass(frozen=True)
class Beginning:
    """What an LLM made of `P` tokens. layers: keys and values [1, H, P, D] of each block; hidden: [1, P, D] behind the
    final norm.
    """

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    hidden: torch.Tensor

    def __len__(self) -> int:
        return self.hidden.shape[1]


class Beginnings:
    """The last Beginning of one LLM, made again when its tokens, weights, device or precision are others."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._made: Beginning | None = None

    def of(self, llm: PreTrainedModel, ids: tuple[int, ...]) -> Beginning:
        """What `llm`, prepared to attend within samples, makes of `ids`."""
        table: Any = llm.get_input_embeddings().weight
        amp = torch.get_autocast_dtype(table.device.type) if torch.is_autocast_enabled(table.device.type) else None
        # weights that are frozen can still be loaded anew; each write in place raises a tensor's version
        key = (ids, table.device, table.dtype, amp, sum(p._version for p in llm.parameters()))
        if self._made is None or key != self._key:
            self._key, self._made = key, _read(llm, torch.tensor([ids], device=table.device))
        return self._made


def _read(llm: PreTrainedModel, ids: torch.Tensor) -> Beginning:
    training = llm.training
    llm.eval()  # in training mode an LLM that recomputes its activations fills no cache
    cache: Any = DynamicCache()
    try:
        with torch.inference_mode(False), torch.no_grad(), attending(Samples((ids.shape[1],))):
            out = llm.base_model(
                inputs_embeds=llm.get_input_embeddings()(ids),
                attention_mask=torch.ones_like(ids, dtype=torch.bool),
                position_ids=torch.arange(ids.shape[1], device=ids.device)[None],
                past_key_values=cache,
                use_cache=True,
            )
    finally:
        llm.train(training)
    return Beginning(tuple((layer.keys, layer.values) for layer in cache.layers), out.last_hidden_state)
