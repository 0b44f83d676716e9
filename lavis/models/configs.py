"""The `model` section of each architecture.

Torch-free, so that a recipe is checked before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Optional

from lavis.config.schema import ModelConfig, NamedFile, opt
from lavis.core.errors import CheckpointError, ConfigError
from lavis.core.registries import MODEL_CONFIGS
from lavis.models.part_configs import EvaConfig, QFormerLinearConfig
from lavis.models.parts import ConnectorConfig, LlmConfig, MediaConfig, TowerConfig

__all__ = ["MODEL_CONFIGS", "Blip2QFormerStage1Config", "ByteLevelBPEConfig", "VlmConfig"]


@MODEL_CONFIGS.register("vlm")
@dataclass
class VlmConfig(ModelConfig):
    """A vision tower, a connector and a chat LLM; or a chat LLM alone."""

    tower: Optional[TowerConfig] = opt(None, "vision tower; null for text alone")
    connector: Optional[ConnectorConfig] = opt(None, "what turns the tower's vectors into inputs of the LLM")
    llm: LlmConfig = opt(LlmConfig, "the chat LLM")
    media: MediaConfig = opt(MediaConfig, "how pictures reach the model")
    max_length: int = opt(512, "longest sample, tokens, images included", at_least=8)
    enable_autocast: bool = opt(True, "as `train.amp`; both must be true")
    released: Optional[str] = opt(
        None,
        "weight file of trained parts that chat opens when no run is named; training starts without it",
        resume="free",
    )

    def __post_init__(self) -> None:
        if self.tower is not None:
            self.media = self.media.suited(self.tower)

    objectives = ("sft", "document")
    row_format = "chat"
    splits = True

    def parts(self) -> dict[str, TowerConfig | ConnectorConfig | LlmConfig]:
        """Name of a part to its section, of those that are there."""
        found = {"tower": self.tower, "connector": self.connector, "llm": self.llm}
        return {name: part for name, part in found.items() if part is not None}

    @property
    def sees(self) -> bool:
        return self.tower is not None

    def changing(self) -> Iterator[str]:
        for name, part in (("tower", self.tower), ("connector", self.connector)):
            if part is not None:
                yield from part.changing(f"model.{name}")

    @property
    def trained(self) -> bool:
        """Whether anything of it is trained."""
        return any(part.trained for part in self.parts().values())

    @property
    def recomputes(self) -> Any:
        return self.llm.recompute

    def with_recomputation(self, on: bool) -> VlmConfig:
        return replace(self, llm=replace(self.llm, recompute=on))

    @property
    def tokens_per_tile(self) -> int:
        """Inputs of the LLM that a picture, or a tile of it, becomes; 0 for text alone."""
        if self.tower is None or self.connector is None:
            return 0
        return self.connector.span(self.tower.span())

    def problems(self) -> Iterator[str]:
        if (self.tower is None) != (self.connector is None):
            lacking = "connector" if self.connector is None else "tower"
            yield f"model.{lacking} is missing: a tower and a connector go together, or neither for text alone."
        found = [problem for name, part in self.parts().items() for problem in part.problems(f"model.{name}")]
        yield from found
        if not found:
            try:
                _ = self.tokens_per_tile
            except ConfigError as error:
                yield str(error)
            except CheckpointError:
                pass  # files that have yet to come say how many vectors a picture is

    def files(self) -> Iterator[NamedFile]:
        for name, part in self.parts().items():
            yield from part.files(f"model.{name}")

    @property
    def tokenizer_source(self) -> tuple[str, str | None]:
        key, name = self.llm.tokenizer_source
        return f"model.llm.{key}", name


@MODEL_CONFIGS.register("blip2_qformer")
@dataclass
class Blip2QFormerStage1Config(ModelConfig):
    """A vision tower and a Q-Former with its text branch, for BLIP-2's first stage; the linear layer is not there."""

    tower: TowerConfig = opt(EvaConfig, "vision tower")
    connector: QFormerLinearConfig = opt(QFormerLinearConfig, "the Q-Former and its queries")
    text_tokenizer: str = opt("ckpt/bert-base-uncased", "folder of the tokenizer that captions are read with")
    media: MediaConfig = opt(MediaConfig, "how pictures reach the model")
    embed_dim: int = opt(256, "width of the contrastive space", at_least=1)
    max_length: int = opt(32, "longest caption, tokens", at_least=4)
    itc_weight: float = opt(1.0, "weight of the image-text contrastive loss", at_least=0)
    itm_weight: float = opt(1.0, "weight of the image-text matching loss", at_least=0)
    itg_weight: float = opt(1.0, "weight of the image-grounded text generation loss", at_least=0)

    def __post_init__(self) -> None:
        self.media = self.media.suited(self.tower)

    objectives = ("blip2_stage1",)
    row_format = "caption"

    @property
    def sees(self) -> bool:
        return True

    def changing(self) -> Iterator[str]:
        yield from self.tower.changing("model.tower")
        yield from self.connector.changing("model.connector")

    def problems(self) -> Iterator[str]:
        yield from self.tower.problems("model.tower")
        yield from self.connector.problems("model.connector")
        if self.connector.name != QFormerLinearConfig().name:
            yield f"model.connector.name is {self.connector.name}, but this model trains a Q-Former: leave it out."
        if self.connector.recompute:
            yield f"model.connector.recompute has no effect with model.arch {self.arch}: set it to false."

    def files(self) -> Iterator[NamedFile]:
        yield from self.tower.files("model.tower")
        yield from self.connector.files("model.connector")
        yield NamedFile("model.text_tokenizer", "tokenizer", self.text_tokenizer)

    @property
    def tokenizer_source(self) -> tuple[str, str | None]:
        return "model.text_tokenizer", self.text_tokenizer


@MODEL_CONFIGS.register("byte_level_bpe")
@dataclass
class ByteLevelBPEConfig(ModelConfig):
    """A byte-level BPE tokenizer with ChatML control tokens, learned from the datasets' text."""

    vocab_size: int = opt(1024, "tokens, the 256 bytes and the control tokens included", at_least=300)
    min_frequency: int = opt(2, "how often a pair must occur to be merged", at_least=1)
    add_prefix_space: bool = opt(
        False, "begin every text with a space, so that its first word is the same token as inside a text"
    )
    split_pattern: Optional[str] = opt(None, "regular expression of words that are never merged with their neighbours")

    objectives = ("tokenizer_training",)
