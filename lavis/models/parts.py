"""The parts a model is put together from, as a recipe names them. Torch-free, so that a recipe is checked at once.

A part is a section of `model` with a `name`. What else the section may hold is the part's own: a dataclass that is
registered together with the class, or for parts of this package by name in lavis.models.part_configs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from lavis.config.schema import opt

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


@dataclass
class TowerConfig(PartConfig):
    """A vision tower: a picture of image_size x image_size pixels becomes `span()` vectors of `width()` numbers."""

    image_size: int = opt(224, "side of the square that a picture, or a tile of it, becomes, pixels", at_least=1)
    precision: str = opt("fp16", "type of a frozen tower's weights on a GPU", choices=("fp16", "bf16", "fp32"))
    recompute: bool = opt(False, "recompute activations in backward (only where the tower is trained)")

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
    )


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
    mean: Optional[list[float]] = opt(None, "per-channel mean of RGB in 0..1; CLIP's when null")
    std: Optional[list[float]] = opt(None, "per-channel standard deviation of RGB in 0..1; CLIP's when null")
    min_scale: float = opt(0.5, "smallest area share of a random crop (only processors that crop)")
    max_scale: float = opt(1.0, "largest area share of a random crop (only processors that crop)")
