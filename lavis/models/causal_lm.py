"""A text-only causal LM, for training small LLMs from nothing or fine-tuning existing ones on text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lavis.core.output import LossOutput
from lavis.core.registries import MODELS
from lavis.core.types import Batch
from lavis.data.assemble import load_tokenizer
from lavis.models.configs import CausalLMConfig
from lavis.models.llm import check_context, generate, load_llm, new_llm, recompute_activations, supervised_loss


@MODELS.register("causal_lm")
class CausalLM(nn.Module):
    """`llm_model` trained in full on the supervised tokens of conversations."""

    logits_chunks: int | None = None
    """See lavis.models.llm.cross_entropy_sum."""

    def __init__(self, llm: PreTrainedModel) -> None:
        super().__init__()
        self.llm_model = llm

    @classmethod
    def from_config(
        cls,
        config: CausalLMConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: torch.device | str = "cpu",
    ) -> CausalLM:
        """The LLM in `config.llm_model`, or a new one of `config.llm_config`'s dimensions for the tokenizer's
        vocabulary (fp32).
        """
        tokenizer = tokenizer or load_tokenizer(config)
        if config.llm_model:
            llm = load_llm(config.llm_model)
        else:
            special_ids = {
                "pad_token_id": tokenizer.pad_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "bos_token_id": None,
            }
            llm = new_llm(config.llm_config, len(tokenizer), special_ids)
        check_context(llm, config.max_txt_len)
        if config.llm_grad_checkpoint:
            recompute_activations(llm)
        return cls(llm)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Input embeddings [B, L, D]."""
        return self.embed_parts(batch.input_ids, None)

    def embed_parts(self, input_ids: torch.Tensor, images: None) -> torch.Tensor:
        """As MiniGPT4Qwen's; there are no images."""
        table = self.llm_model.get_input_embeddings()
        return table(input_ids.to(table.weight.device))

    def forward(self, batch: Batch) -> LossOutput:
        """Loss over the batch's supervised tokens."""
        loss_sum = supervised_loss(
            self.llm_model, self.embed(batch), batch.labels, batch.position_ids, self.logits_chunks
        )
        return LossOutput(loss_sum, batch.supervised_tokens)

    def generate(
        self, batch: Batch, stop_token_ids: Sequence[int], pad_token_id: int, **settings: Any
    ) -> list[list[int]]:
        """Continue the prompts of `batch`; see lavis.models.llm.generate."""
        with torch.inference_mode():
            embeds = self.embed(batch)
        return generate(self.llm_model, embeds, batch.lengths, stop_token_ids, pad_token_id, **settings)
