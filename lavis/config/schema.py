"""The typed schema of a recipe: what `data` and every `model` may hold.

Each field is made with `opt`, whose help text (meaning and unit) also feeds docs/recipes.md and `lavis configs show`.
The models' own sections are in lavis/models/configs.py, what is done with them in lavis/config/sections.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any, ClassVar, Literal, NamedTuple, Optional


def opt(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] | None = None,
    registry: str | None = None,
    at_least: float | None = None,
    resume: Literal["same", "free"] = "same",
) -> Any:
    """A schema field.

    `choices`: the allowed values (of a list: of its items). `registry`: the name must be in this one of REGISTRIES in
    lavis/config/typed.py.
    `at_least`: smallest allowed number.
    `resume`: whether the key may change when a run is resumed: `free` is for what changes neither the data nor the
    optimisation of past steps.
    A mutable default (list, dict) is copied for each instance.
    """
    metadata = {"help": help, "choices": choices, "registry": registry, "at_least": at_least, "resume": resume}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def as_list(value: Any) -> list[Any]:
    """The items of a key that takes one value or a list; null is none."""
    return value if isinstance(value, list) else [] if value is None else [value]


class NamedFile(NamedTuple):
    """A file or folder that a section names: dotted key, kind (weights, llm, tokenizer, checkpoint), and its name."""

    key: str
    kind: str
    name: str


@dataclass
class ModelConfig:
    """Keys common to all models, and what the rest of the program asks of a model before it is built."""

    arch: str = opt("vlm", "name of the model in the registry")
    preset: Optional[str] = opt(
        None, "YAML file of defaults below lavis/configs/models, such as minigpt4qwen/shapes", resume="free"
    )
    chat_template: Optional[str] = opt(
        None,
        "template of conversations for an LLM that brings none: Jinja, or the name of one (vicuna, chatml);"
        " null = the tokenizer's, else ChatML",
    )

    objectives: ClassVar[tuple[str, ...]] = ()
    """Built-in objectives that can train it; the first one is proposed."""
    row_format: ClassVar[str | None] = None
    """What it reads rows as: chat or caption; None for text that is not encoded."""
    splits: ClassVar[bool] = False
    """Whether a pipeline can cut it into stages."""

    @property
    def sees(self) -> bool:
        return False

    def changing(self) -> Iterator[str]:
        """Settings, as `key=value`, that let an image's vectors change while training, so that they can't be stored."""
        yield from ()

    @property
    def trained(self) -> bool:
        """Whether anything of it is trained."""
        return True

    @property
    def recomputes(self) -> Any:
        """Whether activations are recomputed in backward: true, false, or auto where a runner has to settle it."""
        return False

    def with_recomputation(self, on: bool) -> ModelConfig:
        """The same with `recomputes` settled."""
        return self

    def problems(self) -> Iterator[str]:
        """Sentences about values of the section that can't work together."""
        yield from ()

    def files(self) -> Iterator[NamedFile]:
        """Files and folders that it names."""
        yield from ()

    @property
    def tokenizer_source(self) -> tuple[str, str | None]:
        """(dotted key, folder or hub name) of its tokenizer."""
        return "model.tokenizer", None


@dataclass
class ProcessorConfig:
    """An image or text processor."""

    name: str = opt("blip2_image_eval", "name of the processor in the registry", registry="processor")
    image_size: int = opt(224, "side of the square the image becomes, pixels", at_least=1)
    mean: Optional[list[float]] = opt(None, "per-channel mean of RGB in 0..1; CLIP's when null")
    std: Optional[list[float]] = opt(None, "per-channel standard deviation of RGB in 0..1; CLIP's when null")
    min_scale: float = opt(0.5, "smallest area share of a random crop (only processors that crop)")
    max_scale: float = opt(1.0, "largest area share of a random crop (only processors that crop)")
    resize: str = opt("square", "stretch to a square, or pad with the mean colour first", choices=("square", "pad"))
    tiling: str = opt("none", "how a large picture is cut into tiles", choices=("none", "tiles", "anyres"))
    max_tiles: int = opt(6, "most tiles of a picture, the whole picture not counted", at_least=1)
    max_words: Optional[int] = opt(None, "text: words kept; null keeps all", at_least=1)
    prompt: Optional[str] = opt(None, "text: put before the caption")


@dataclass
class ProcessorPair:
    """A processor for training and one for evaluation."""

    train: ProcessorConfig = opt(ProcessorConfig, "used on training splits")
    eval: ProcessorConfig = opt(ProcessorConfig, "used on the other splits and for chat")


@dataclass
class TextProcessorConfig(ProcessorConfig):
    name: str = opt("base_instruction", "name of the processor in the registry", registry="processor")


@dataclass
class TextProcessorPair(ProcessorPair):
    """A text processor for training and one for evaluation."""

    train: TextProcessorConfig = opt(TextProcessorConfig, "used on training splits")
    eval: TextProcessorConfig = opt(TextProcessorConfig, "used on the other splits and for chat")


@dataclass
class PreprocessConfig:
    """The `preprocess` section of a model's default YAML: the processors its weights were trained with."""

    vis_processor: ProcessorPair = opt(ProcessorPair, "image processors")
    text_processor: TextProcessorPair = opt(TextProcessorPair, "text processors")


@dataclass
class TextConfig:
    """What is done to the questions of conversations, or to captions, before they are tokenised."""

    name: str = opt("base_instruction", "name of the text processor in the registry", registry="processor")
    max_words: Optional[int] = opt(None, "words kept; null keeps all", at_least=1)
    prompt: Optional[str] = opt(None, "put before the text")


KINDS = ("conversation", "caption", "document", "pair", "prompt")
"""Kinds of rows."""


@dataclass
class DataEntry:
    """One entry of data.train, data.valid or data.test: rows of one kind from one source."""

    name: Optional[str] = opt(None, "what messages call it; null = the name of the source")
    source: str = opt("files", "where the rows come from: files, or a name in the registry", registry="source")
    path: Optional[Any] = opt(
        None, "annotation file, or a list of files (JSON, JSONL, CSV, Parquet); relative paths resolve under cache/"
    )
    images: Optional[str] = opt(None, "folder that image paths in annotations are relative to")
    format: str = opt("auto", "dialect of the rows; auto looks at the keys of each row")
    kind: str = opt(
        "conversation",
        "what is learned from a row: conversation = its answers; caption = its last answer alone; document = all of its"
        " text, in blocks of full length; pair = a chosen and a rejected answer; prompt = nothing, it is asked",
        choices=KINDS,
    )
    weight: Optional[float] = opt(
        None, "share in an epoch of unchanged size, for all entries or none; null = all rows once", at_least=0
    )
    supervise: str = opt(
        "assistant",
        "which tokens are learned: assistant = answers and their end token; "
        "markup = also the control tokens of every turn, as the original did",
        choices=("assistant", "markup"),
    )
    text: TextConfig = opt(TextConfig, "text processor")
    split: Optional[str] = opt(
        None, "name of the results (test/<split>/accuracy), and which part a generated source gives; null = the section"
    )
    fraction: Optional[float] = opt(
        None, "in valid and test: this share of the rows of train is taken out of training; of the entry `name`, or all"
    )
    url: Optional[Any] = opt(
        None,
        "https address that `lavis weights --download` fetches a missing file from (one, or a list: one for each file)",
    )
    sha256: Optional[Any] = opt(None, "SHA-256 of what is at url, 64 hexadecimal digits (one, or a list)")
    generate: dict[str, Any] = opt({}, "arguments of a source that generates its rows (the shapes world): sizes, seed")

    def meaning(self, section: str) -> dict[str, Any]:
        """The values as an entry of this section, with what its nulls stand for and without what says nothing."""
        named = {"name": self.name or self.source, "split": self.split or section}
        return asdict(self) | named | {"format": self.format if self.source == "files" else None}

    def files(self) -> list[tuple[str, Optional[str], Optional[str]]]:
        """(path, address, SHA-256) of each file; the last two are None where they are not given.

        A `url` that is a path, as in the original's files, is no address.
        """
        rows = zip_longest(*map(as_list, (self.path, self.url, self.sha256)))
        return [(path, url if url and "://" in url else None, sha256) for path, url, sha256 in rows if path]


@dataclass
class DataConfig:
    """The `data` section: which rows are trained and judged on, and how they are brought to the model."""

    train: list[DataEntry] = opt([], "what is trained on")
    valid: list[DataEntry] = opt([], "whose loss is measured during training", resume="free")
    test: list[DataEntry] = opt([], "what is evaluated at the end", resume="free")
    packing: bool = opt(False, "pack samples into rows of pack_length with block-diagonal attention")
    pack_length: int = opt(2048, "tokens of a packed row", at_least=8)
    length_grouping: bool = opt(True, "put samples of like length into the same micro-batch, which saves padding")
    num_workers: int = opt(
        4, "processes per rank that load images; 0 loads in the training process", at_least=0, resume="free"
    )
    prepare_workers: Optional[int] = opt(
        None,
        "processes that prepare rows before training, while the other ranks of a host wait; 0 or 1 = in the training"
        " process; null = one for each core that it may use, 8 at most",
        at_least=0,
        resume="free",
    )
    max_bad_image_share: float = opt(
        0.01, "stop when more than this share of images could not be read, once 100 were", at_least=0, resume="free"
    )
    cache_features: Any = opt(
        "auto",
        "encode each image once with the frozen vision tower and keep the result (needs a frozen tower and an image"
        " processor without anything random); auto = where that is so, the run shows each image twice or more, and the"
        " vectors fit into cache_features_gib and half of the free disk",
        choices=("auto", True, False),
        resume="free",
    )
    cache_features_gib: float = opt(50, "most that `cache_features: auto` writes, GiB", at_least=0, resume="free")

    def sections(self) -> dict[str, list[DataEntry]]:
        """Name of a list of entries to its entries."""
        return {"train": self.train, "valid": self.valid, "test": self.test}

    def entries(self) -> list[tuple[str, DataEntry]]:
        """(dotted key, entry) of all entries."""
        return [(f"data.{name}.{i}", e) for name, entries in self.sections().items() for i, e in enumerate(entries)]
