"""`lavis export hf` of a text model: the LLM as transformers saves it, with its tokenizer."""

from __future__ import annotations

import copy
from pathlib import Path

from lavis.core.registries import EXPORTERS
from lavis.export.base import Exporter, Precision, Written
from lavis.export.hf import build, open_texts
from lavis.export.trained import Trained
from lavis.models.configs import VlmConfig


@EXPORTERS.register("text_llm")
class TextLlmExporter(Exporter):
    """A folder that AutoModelForCausalLM and AutoTokenizer open, adapters merged."""

    whole = True

    def problem(self, config: VlmConfig) -> str | None:
        return "a text LLM has no vision tower, this model has one." if config.sees else None

    def write(self, trained: Trained, target: Path, *, precision: Precision, max_shard_size: str) -> Written:
        texts = open_texts(trained, target)
        llm = build(trained, texts.tokenizer, precision).llm_model
        settings = copy.deepcopy(llm.generation_config)
        settings.eos_token_id, settings.pad_token_id = list(texts.template.stop_token_ids), texts.template.pad_token_id
        llm.generation_config = settings
        llm.save_pretrained(target, max_shard_size=max_shard_size)
        texts.tokenizer.save_pretrained(target)
        return Written(target, tuple(sorted(target.iterdir())))
