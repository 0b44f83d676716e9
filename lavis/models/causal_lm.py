"""A text-only causal LM, for training small LLMs from nothing or fine-tuning existing ones on text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lavis.core.registries import MODELS
from lavis.core.types import Batch
from lavis.data.assemble import load_tokenizer
from lavis.models.configs import CausalLMConfig
from lavis.models.llm import check_context, hidden_states, load_llm, new_llm, recompute_activations
from lavis.models.scoring import Scorer


@MODELS.register("causal_lm")
class CausalLM(nn.Module):
    """`llm_model` trained in full on the supervised tokens of conversations."""

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

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Last hidden states [B, L, D], behind the final norm."""
        return hidden_states(self.llm_model, self.embed(batch), batch.position_ids)

    def forward(self, batch: Batch) -> torch.Tensor:
        """As `hidden`."""
        return self.hidden(batch)

    def scorer(self, calls: Callable[[int], int] | None = None) -> Scorer:
        """The LLM's head; `calls`: see Scorer."""
        return Scorer(self.llm_model, calls)

    def filler(self, batch: Batch, *, run_frozen: bool = False) -> Batch:
        """As MiniGPT4Qwen's; every part takes part in any batch."""
        return batch

    def borrowed_parameters(self) -> list[tuple[nn.Module, nn.Parameter]]:
        """As Blip2Base's; there are none."""
        return []

    def export(self, folder: Path, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase) -> list[Path]:
        """A Hugging Face folder: the LLM and its tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        self.llm_model.to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return [folder]
