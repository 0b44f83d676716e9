"""`lavis export hf`: a run as a folder that stock transformers opens, as Blip2ForConditionalGeneration for one."""

from __future__ import annotations

import copy
import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lavis.config.init import inits
from lavis.core.errors import CheckpointError, ConfigError
from lavis.core.registries import EXPORTERS
from lavis.data.assemble import media_processor
from lavis.data.texts import Texts
from lavis.export.base import Exporter, Precision, Written, exporter_for
from lavis.export.hf_processor import write_blip2_processor
from lavis.export.model_card import BLIP2, About, model_card
from lavis.export.trained import Trained
from lavis.models.adapters import merge_lora
from lavis.models.configs import VlmConfig
from lavis.models.hf.blip2 import as_blip2, blip2_config
from lavis.models.llm import DTYPES
from lavis.models.part_configs import EvaConfig, QFormerLinearConfig
from lavis.models.vlm import Vlm
from lavis.runs.checkpoint import frozen_files, identity
from lavis.runs.folder import frozen_differences
from lavis.tokens.template import ChatTemplate
from lavis.weights.tensors import load_tensors

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 512
"""Longest answer by default, as in the original's demos."""


class StockExporter(Exporter):
    """A folder that transformers opens: model, processor, generation settings and model card."""

    whole = True
    about: ClassVar[About]

    @abstractmethod
    def stock_model(self, model: Vlm, stop_token_ids: Sequence[int], pad_token_id: int) -> PreTrainedModel:
        """A model of transformers that shares the tensors of `model`, whose adapters are merged."""

    @abstractmethod
    def write_processor(self, folder: Path, template: ChatTemplate, model: Vlm) -> list[str]:
        """Write tokenizer, chat template and image processor.

        Returns the prompts that stock transformers encodes otherwise than this program, a line for each.
        """

    def write(
        self, trained: Trained, target: Path, *, precision: Precision = "auto", max_shard_size: str = "5GB"
    ) -> Written:
        """See Exporter. Raises ConfigError when the folder is not empty, CheckpointError when the run's frozen weights
        have changed since.
        """
        texts = open_texts(trained, target)
        model = build(trained, texts.tokenizer, precision)
        target.mkdir(parents=True, exist_ok=True)
        template = cast(ChatTemplate, texts.template)  # a model that sees and answers has no other
        self._write_model(model, template, target, max_shard_size)
        differences = self.write_processor(target, template, model)
        for difference in differences:
            log.warning("stock transformers reads this prompt otherwise: %s", difference)
        (target / "README.md").write_text(model_card(trained, differences, self.about), encoding="utf-8")
        return Written(target, tuple(sorted(target.iterdir())), tuple(differences))

    def _write_model(self, model: Vlm, template: ChatTemplate, folder: Path, max_shard_size: str) -> None:
        _give_placeholder_a_row(model, template.pad_token_id)
        stock = self.stock_model(model, template.stop_token_ids, template.pad_token_id)
        settings = copy.deepcopy(model.llm_model.generation_config)
        settings.eos_token_id, settings.pad_token_id = list(template.stop_token_ids), template.pad_token_id
        settings.max_new_tokens = MAX_NEW_TOKENS
        settings._from_model_config = False  # else stock generation would make it from the configuration
        stock.generation_config = settings
        stock.save_pretrained(folder, max_shard_size=max_shard_size)
        # What stock transformers loads when asked for no type. save_pretrained wrote that of the first tensor.
        stock.config.dtype = model.llm_model.dtype
        stock.config.save_pretrained(folder)


@EXPORTERS.register("blip2")
class Blip2Exporter(StockExporter):
    """Blip2ForConditionalGeneration."""

    about = BLIP2

    def problem(self, config: VlmConfig) -> str | None:
        if config.tower is None or config.connector is None:
            return "Blip2ForConditionalGeneration has a vision tower, this model has none."
        media = config.media
        if media.tiling != "none" or media.resize != "square":
            return (
                "Blip2ForConditionalGeneration is shown a picture as one square, but model.media has tiling"
                f" {media.tiling}, resize {media.resize}: export with `lavis export pth`."
            )
        wanted = (EvaConfig().name, QFormerLinearConfig().name)
        if (config.tower.name, config.connector.name) != wanted:
            return (
                f"Blip2ForConditionalGeneration is {' + '.join(wanted)}, this model is {config.tower.name} +"
                f" {config.connector.name}."
            )
        return None

    def stock_model(self, model: Vlm, stop_token_ids: Sequence[int], pad_token_id: int) -> PreTrainedModel:
        return as_blip2(model, blip2_config(model, stop_token_ids, pad_token_id))

    def write_processor(self, folder: Path, template: ChatTemplate, model: Vlm) -> list[str]:
        return write_blip2_processor(folder, template, media_processor(model.config))


def export_hf(trained: Trained, folder: Path, *, precision: Precision = "auto", max_shard_size: str = "5GB") -> Written:
    """Write what the exporter of such a model writes to `folder`; weights in files of at most `max_shard_size`."""
    exporter = exporter_for("hf", trained.model)
    return exporter.write(trained, folder, precision=precision, max_shard_size=max_shard_size)


def open_texts(trained: Trained, folder: Path) -> Texts:
    """Tokenizer and template of a run that is about to be written to `folder`.

    Raises ConfigError when the folder is not empty, CheckpointError when the run's frozen weights have changed since.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: give a new folder, or empty this one.")
    texts = Texts.of(trained.recipe)
    frozen = {key: identity(path) for key, path in frozen_files(trained.recipe.model).items()}
    if changed := frozen_differences(trained.checkpoint.state().frozen, frozen):
        names = ", model.".join(changed)
        raise CheckpointError(
            f"{trained.checkpoint.path} was trained with other frozen weights than those there now: model.{names}. Put"
            " those back."
        )
    return texts


def build(trained: Trained, tokenizer: PreTrainedTokenizerFast, precision: Precision = "auto") -> Vlm:
    """The trained model on the CPU, its LoRA adapters merged, in eval mode."""
    # A quantised LLM has lost its weights: the ones it was made from are exported.
    config = replace(trained.model, llm=replace(trained.model.llm, quantization=None, device_map=None))
    as_stored = precision == "auto" and config.llm.train == "frozen"
    init = inits(trained.recipe.init)
    model = Vlm.from_config(config, tokenizer, llm_dtype="auto" if as_stored else torch.float32, init=init)
    tensors = trained.checkpoint.tensors()
    load_tensors(model, tensors, file=trained.checkpoint.path, wanted=lambda name: name in tensors)
    merge_lora(model)
    return (model if precision == "auto" else model.to(DTYPES[precision])).eval()


def _give_placeholder_a_row(model: Vlm, like: int) -> None:
    """Add embedding rows up to the image placeholder's, if it was added to the tokenizer: stock transformers looks it
    up before it replaces it.

    New rows equal row `like`, the padding's, which is never generated: so the new ids aren't either.
    """
    llm = model.llm_model
    rows = cast(torch.Tensor, llm.get_input_embeddings().weight).shape[0]
    assert model.image_token_id is not None
    if model.image_token_id < rows:
        return
    llm.resize_token_embeddings(model.image_token_id + 1, mean_resizing=False)
    with torch.no_grad():
        for tensor in (*llm.get_input_embeddings().parameters(), *llm.get_output_embeddings().parameters()):
            tensor[rows:] = tensor[like]
