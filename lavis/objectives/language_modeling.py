"""Text-only training of a causal LM on conversations."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lavis.core.registries import TASKS
from lavis.objectives.base import Task


@TASKS.register("language_modeling")
class LanguageModeling(Task):
    """Next-token loss on the answers of text conversations."""

    archs = ("vlm",)
    generates = True

    def export(self, model: nn.Module, folder: Path, dtype: torch.dtype) -> list[Path]:
        """A Hugging Face folder: the LLM and its tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        model.llm_model.to(dtype).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return [folder]
