"""`lavis export hf` of a LLaVA: a vision model of transformers, an MLP and a chat LLM."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import LlavaImageProcessorPil, LlavaProcessor, PreTrainedModel

from lavis.core.registries import EXPORTERS
from lavis.data.assemble import media_processor
from lavis.export.hf import StockExporter
from lavis.export.hf_processor import write_processor
from lavis.export.model_card import LLAVA
from lavis.models.configs import VlmConfig
from lavis.models.hf.llava import selection, to_stock, why_not
from lavis.models.vlm import Vlm
from lavis.tokens.template import ChatTemplate


@EXPORTERS.register("llava")
class LlavaExporter(StockExporter):
    """LlavaForConditionalGeneration."""

    about = LLAVA

    def problem(self, config: VlmConfig) -> str | None:
        reason = why_not(config)
        return f"{reason}." if reason else None

    def stock_model(self, model: Vlm, stop_token_ids: Sequence[int], pad_token_id: int) -> PreTrainedModel:
        return to_stock(model, stop_token_ids, pad_token_id)

    def write_processor(self, folder: Path, template: ChatTemplate, model: Vlm) -> list[str]:
        """See StockExporter. The processor makes of one image token as many as the picture has vectors."""
        image = media_processor(model.config)
        pictures = LlavaImageProcessorPil(
            size={"height": image.image_size, "width": image.image_size},
            do_center_crop=False,
            do_pad=image.resize == "pad",
            image_mean=list(image.mean),
            image_std=list(image.std),
        )
        strategy, prefix = selection(model.config)
        tower: Any = model.visual_encoder
        processor = partial(
            LlavaProcessor,
            pictures,
            patch_size=tower.model.config.patch_size,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=prefix,
            image_token=template.tokenizer.convert_ids_to_tokens(template.image_token_id),
        )
        return write_processor(folder, template, processor, 1)
