"""The parts a model is put together from, as a recipe names them. Torch-free, so that a recipe is checked at once.

A part is a section of `model` with a `name`. What else the section may hold is the part's own: a dataclass that is
registered together with the class, or for parts of this package by name in lavis.models.part_configs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional

from lavis.config.schema import NamedFile, ProcessorConfig, ProcessorPair, opt
from lavis.core.registries import CONNECTORS, TOWERS

TRAIN = ("frozen", "full", "lora")


@dataclass
class LoraSettings:
    """Adapters of a part whose `train` is lora."""

    rank: int = opt(8, "rank of the adapters", at_least=1)
    alpha: float = opt(32, "scale of the adapters times their rank", at_least=0)
    dropout: float = opt(0.05, "dropout before the adapters", at_least=0)
    targets: Any = opt(
        "linear", "layers that get adapters: linear (all but the head), attention, or a list of name endings"
    )


@dataclass
class PartConfig:
    """What every part has."""

    name: str = opt("", "name of the part in its registry")
    weights: Optional[str] = opt(None, "weight file or folder, or a name on the hub; null starts from random weights")
    train: str = opt("frozen", "what is trained of it: nothing, everything, or LoRA adapters", choices=TRAIN)
    lora: LoraSettings = opt(LoraSettings, "adapters, where train is lora")
    lr_scale: float = opt(1.0, "factor on the learning rate of this part", at_least=0)

    @property
    def trained(self) -> bool:
        """Whether anything of it is trained."""
        return self.train != "frozen"

    def without_files(self) -> PartConfig:
        """The same part where its weights come from elsewhere: what its files say of it stands in the section."""
        return replace(self, weights=None)

    def problems(self, key: str) -> Iterator[str]:
        """Sentences about values that can't work together; `key` is the dotted key of the section."""
        yield from ()

    def files(self, key: str) -> Iterator[NamedFile]:
        if self.weights:
            yield NamedFile(f"{key}.weights", "weights", self.weights)


@dataclass
class TowerConfig(PartConfig):
    """A vision tower: a picture of image_size x image_size pixels becomes `span()` vectors of `width()` numbers."""

    image_size: int = opt(224, "side of the square that a picture, or a tile of it, becomes, pixels", at_least=1)
    precision: str = opt("fp16", "type of a frozen tower's weights on a GPU", choices=("fp16", "bf16", "fp32"))
    recompute: bool = opt(False, "recompute activations in backward (only where the tower is trained)", resume="free")

    @classmethod
    def choose(cls, values: Mapping[str, Any]) -> type[TowerConfig]:
        """The dataclass of the tower that the section `values` names. Raises RegistryError for an unknown one."""
        return TOWERS.config(str(values.get("name") or "eva_clip_g"))

    def changing(self, key: str) -> Iterator[str]:
        """What of the section, at the dotted `key`, lets an image's vectors change while training."""
        if self.train != "frozen":
            yield f"{key}.train={self.train}"

    def blocks(self) -> int | None:
        """Blocks that cost the same each, so that a plan runs two and multiplies; None: it runs the tower whole."""
        return None

    def with_depth(self, blocks: int) -> TowerConfig:
        """The same tower with so many blocks. Only where `blocks` is known."""
        raise NotImplementedError

    def pixels(self) -> tuple[list[float] | None, list[float] | None]:
        """Mean and standard deviation of RGB, in 0..1, that its weights were trained with; None means CLIP's."""
        return None, None

    def span(self) -> int:
        """Vectors a picture (or tile) becomes."""
        raise NotImplementedError

    def width(self) -> int:
        """Numbers of each vector."""
        raise NotImplementedError


@dataclass
class ConnectorConfig(PartConfig):
    """What turns a tower's vectors into inputs of the LLM."""

    train: str = opt("full", "what is trained of it: nothing, everything, or LoRA adapters", choices=TRAIN)
    recompute: bool = opt(False, "recompute its activations in backward", resume="free")

    @classmethod
    def choose(cls, values: Mapping[str, Any]) -> type[ConnectorConfig]:
        return CONNECTORS.config(str(values.get("name") or "qformer_linear"))

    def changing(self, key: str) -> Iterator[str]:
        """As TowerConfig.changing, for what Connector.encode gives."""
        yield from ()

    @property
    def whole(self) -> bool:
        """Whether `weights` brings all of it, so that a model answers without anything trained."""
        return self.weights is not None

    def encoded(self, tokens: int, width: int) -> tuple[int, int]:
        """(vectors, numbers of each) that Connector.encode makes of `tokens` vectors of the tower, `width` wide."""
        return tokens, width

    def span(self, tokens: int) -> int:
        """Inputs of the LLM that `tokens` vectors of the tower become."""
        raise NotImplementedError


@dataclass
class LlmConfig(PartConfig):
    """The causal LM."""

    weights: Optional[str] = opt(None, "folder, GGUF file or hub name of the LLM; null makes one from `config`")
    config: dict[str, Any] = opt({}, "transformers configuration of a new LLM: model_type, hidden_size, ...")
    tokenizer: Optional[str] = opt(None, "folder or hub name of the tokenizer; null takes that of `weights`")
    quantization: Optional[str] = opt(
        None, "type of a frozen LLM's weights, if not that of the device (bitsandbytes)", choices=(None, "int8", "int4")
    )
    device_map: Optional[str] = opt(None, "where the LLM's layers go in chat", choices=(None, "cpu", "auto"))
    recompute: Any = opt(
        "auto",
        "recompute activations in backward: less memory, slower; auto = on a GPU, where the plan of the run does not "
        "fit without",
        choices=("auto", True, False),
        resume="free",
    )

    @property
    def recomputes(self) -> bool:
        """Whether activations are recomputed; `auto` is settled before a model is built."""
        return self.recompute is True

    @property
    def drops_out(self) -> bool:
        """Whether adapters drop out some of what they read in training."""
        return self.train == "lora" and self.lora.dropout > 0

    @property
    def tokenizer_source(self) -> tuple[str, str | None]:
        """(key within the section, folder or hub name) of the tokenizer."""
        return ("tokenizer", self.tokenizer) if self.tokenizer else ("weights", self.weights)

    def files(self, key: str) -> Iterator[NamedFile]:
        for name, kind in (("weights", "llm"), ("tokenizer", "tokenizer")):
            if value := getattr(self, name):
                yield NamedFile(f"{key}.{name}", kind, value)

    def problems(self, key: str) -> Iterator[str]:
        if self.quantization and self.train == "full":
            yield (
                f"{key}.quantization {self.quantization} keeps the LLM's weights in integers, which can't be trained:"
                f" set {key}.train=frozen or lora."
            )
        if self.config and not self.weights and self.train != "full":
            yield f"{key}.config makes a new LLM, which has to be trained: set {key}.train=full."
        if not (self.weights or self.config):
            yield f"{key}.weights names no LLM, and {key}.config does not say what a new one is like: give one of them."


@dataclass
class MediaConfig:
    """How pictures reach the model: what is made of their pixels, and what is written around them."""

    format: str = opt("minigpt4qwen", "what stands around a picture in the text of a turn", registry="media_format")
    resize: str = opt(
        "square", "square: stretch to a square; pad: pad with the mean colour first", choices=("square", "pad")
    )
    tiling: str = opt(
        "none",
        "tiles that a large picture is cut into: none; tiles (InternVL: best grid of at most max_tiles, and the whole "
        "picture); anyres (LLaVA-NeXT: the whole picture, then the tiles row by row)",
        choices=("none", "tiles", "anyres"),
    )
    max_tiles: int = opt(6, "most tiles of a picture, the whole picture not counted", at_least=1)
    processor: str = opt("blip2_image_eval", "image processor", registry="processor")
    train_processor: Optional[str] = opt(None, "image processor of training; null = `processor`", registry="processor")
    mean: Optional[list[float]] = opt(None, "per-channel mean of RGB in 0..1; null = the tower's, else CLIP's")
    std: Optional[list[float]] = opt(
        None, "per-channel standard deviation of RGB in 0..1; null = the tower's, else CLIP's"
    )
    min_scale: float = opt(0.5, "smallest area share of a random crop (only processors that crop)")
    max_scale: float = opt(1.0, "largest area share of a random crop (only processors that crop)")

    def suited(self, tower: TowerConfig) -> MediaConfig:
        """The same with what it leaves to `tower` filled in, so that a run's config.yaml and exports say it."""
        mean, std = tower.pixels()
        return replace(self, mean=self.mean or mean, std=self.std or std)

    def processors(self, image_size: int) -> ProcessorPair:
        """What is made of a picture's pixels, in training and otherwise."""
        size: dict[str, Any] = {"image_size": image_size, "mean": self.mean, "std": self.std}
        size |= {"min_scale": self.min_scale, "max_scale": self.max_scale}
        train = ProcessorConfig(name=self.train_processor or self.processor, **size)
        return ProcessorPair(train, ProcessorConfig(name=self.processor, **size))
