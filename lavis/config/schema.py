"""The typed schema of a recipe: what `run`, `data` and every `model` may hold.

Each field is made with `opt`, whose help text (meaning and unit) also feeds docs/recipes.md and `lavis configs show`.
The models' own sections are in lavis/models/configs.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, ClassVar, Literal, NamedTuple, Optional


def opt(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] | None = None,
    registry: str | None = None,
    at_least: float | None = None,
    unused: str | None = None,
    resume: Literal["same", "free"] = "same",
) -> Any:
    """A schema field.

    `choices`: the allowed values (of a list: of its items). `registry`: the name must be in this registry (`task`,
    `runner`, `processor`, `lr_schedule`).
    `at_least`: smallest allowed number. `unused`: why the key, kept for old recipes, no longer matters (warned once
    when set).
    `resume`: whether the key may change when a run is resumed: `free` is for what changes neither the data nor the
    optimisation of past steps.
    A mutable default (list, dict) is copied for each instance.
    """
    metadata = {"help": help, "choices": choices, "registry": registry, "at_least": at_least, "unused": unused}
    metadata["resume"] = resume
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

    tasks: ClassVar[tuple[str, ...]] = ()
    """Tasks that can train it; the first one is proposed."""
    row_format: ClassVar[str | None] = None
    """What it reads rows as: chat or caption; None for text that is not encoded."""
    splits: ClassVar[bool] = False
    """Whether a pipeline can cut it into stages."""

    @property
    def sees(self) -> bool:
        """Whether it reads images."""
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
    """A text processor."""

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
    max_bad_image_share: float = opt(
        0.01, "stop when more than this share of images could not be read", at_least=0, resume="free"
    )
    cache_features: bool = opt(
        False,
        "encode each image once with the frozen vision tower and keep the result (needs a frozen tower and an image"
        " processor without anything random)",
        resume="free",
    )

    def sections(self) -> dict[str, list[DataEntry]]:
        """Name of a list of entries to its entries."""
        return {"train": self.train, "valid": self.valid, "test": self.test}

    def entries(self) -> list[tuple[str, DataEntry]]:
        """(dotted key, entry) of all entries."""
        return [(f"data.{name}.{i}", e) for name, entries in self.sections().items() for i, e in enumerate(entries)]


@dataclass
class SamplePrompt:
    """A fixed question, answered before, during and after training."""

    image: Optional[str] = opt(None, "path of the image; null asks without one")
    prompt: str = opt("Describe this image.", "the question")


@dataclass
class RunConfig:
    """The `run` section: what is done, for how long, how it is optimised and what is written."""

    runner: str = opt("runner_base", "name of the runner in the registry", registry="runner", resume="free")
    task: str = opt("image_text_pretrain", "name of the task in the registry", registry="task")

    # how long, how much; the batch may change since only its product with the ranks matters, which is checked apart
    max_epoch: int = opt(10, "passes over the training data", at_least=1, resume="free")
    max_steps: Optional[int] = opt(
        None, "optimiser steps; ends training before max_epoch when reached", at_least=1, resume="free"
    )
    batch_size_train: int = opt(
        1, "micro-batch: samples (packed: rows of pack_length) per rank and forward", at_least=1, resume="free"
    )
    batch_size_eval: int = opt(
        16, "samples per rank and forward in validation and generation", at_least=1, resume="free"
    )
    accum_grad_iters: int = opt(1, "micro-batches per optimiser step", at_least=1, resume="free")
    global_batch_size: Optional[int] = opt(
        None,
        "samples (packed: rows) per optimiser step over all ranks; accum_grad_iters then follows from it",
        at_least=1,
        resume="free",
    )

    # optimisation
    lr_sched: str = opt("linear_warmup_cosine_lr_step-wise", "learning-rate schedule", registry="lr_schedule")
    init_lr: float = opt(1e-4, "peak learning rate", at_least=0)
    min_lr: float = opt(1e-6, "learning rate at the end of the decay", at_least=0)
    warmup_lr: float = opt(0.0, "learning rate at the first step of the warm-up; -1 = init_lr")
    warmup_steps: int = opt(0, "optimiser steps of linear warm-up", at_least=0)
    warmup_ratio: Optional[float] = opt(None, "warm-up as a share of all steps; overrides warmup_steps", at_least=0)
    lr_decay_rate: Optional[float] = opt(None, "factor per epoch of linear_warmup_step_lr", at_least=0)
    lr_layer_decay: float = opt(1.0, "factor per layer, from the top of the vision tower down", at_least=0)
    weight_decay: float = opt(0.05, "AdamW weight decay; not on 1-D tensors", at_least=0)
    beta1: float = opt(0.9, "AdamW beta1", at_least=0)
    beta2: float = opt(0.999, "AdamW beta2", at_least=0)
    adam_eps: float = opt(1e-8, "AdamW epsilon", at_least=0)
    grad_norm_clip: Optional[float] = opt(1.0, "largest norm of the gradient; null does not clip", at_least=0)
    amp: bool = opt(True, "mixed precision on a GPU; the CPU trains in fp32 unless autocast_on_cpu")
    autocast_dtype: str = opt("bf16", "type of mixed precision", choices=("bf16", "fp16"))
    autocast_on_cpu: bool = opt(False, "mixed precision on the CPU too (bf16 only)")
    loss_scale: Optional[float] = opt(None, "fixed loss scale of fp16; null scales dynamically", at_least=1)
    seed: int = opt(42, "seed of initialisation, data order and dropout", at_least=0)

    # evaluation
    evaluate: bool = opt(False, "only evaluate, no training", resume="free")
    evaluate_blind: bool = opt(False, "evaluate the test splits with the images removed as well", resume="free")
    evaluate_before: bool = opt(False, "evaluate the test splits before training as well", resume="free")
    max_eval_samples: Optional[int] = opt(
        None, "samples per split in evaluation; null = all", at_least=1, resume="free"
    )
    max_new_tokens: int = opt(
        64, "longest generated answer in evaluation and sample prompts, tokens", at_least=1, resume="free"
    )

    # what is written
    output_dir: str = opt("output/run", "each start makes a folder of its own in here, named by time", resume="free")
    log_freq: int = opt(10, "optimiser steps between log lines", at_least=1, resume="free")
    eval_freq: Optional[int] = opt(
        None, "optimiser steps between validations; null = once an epoch", at_least=1, resume="free"
    )
    save_freq: Optional[int] = opt(
        None, "optimiser steps between checkpoints; null = once an epoch", at_least=1, resume="free"
    )
    keep_checkpoints: int = opt(2, "newest checkpoints kept, beside the best", at_least=1, resume="free")
    sample_prompts: list[SamplePrompt] = opt(
        [], "fixed questions answered before, during and after training", resume="free"
    )
    num_sample_prompts: int = opt(
        4,
        "without sample_prompts: how many rows of the first test (else validation) split are asked",
        at_least=0,
        resume="free",
    )
    export: Optional[str] = opt(
        None,
        "folder (relative: under cache/) that the trained parts are written to at the end, for a later recipe to load",
        resume="free",
    )
    export_dtype: str = opt(
        "fp32", "type of exported floating-point tensors", choices=("fp32", "fp16", "bf16"), resume="free"
    )
    trackers: list[str] = opt(
        ["tensorboard"],
        "where metrics go beside metrics.jsonl",
        choices=("tensorboard", "wandb", "swanlab"),
        resume="free",
    )

    # resuming
    resume: str = opt(
        "never",
        "never; auto = newest complete checkpoint under output_dir; or the path of a run or checkpoint",
        resume="free",
    )
    resume_ckpt_path: Optional[str] = opt(None, "the original's name for a path in `resume`", resume="free")
    resume_ckpt_load_dir: Optional[str] = opt(
        None, "the original's name for `resume` under DeepSpeed, with resume_ckpt_tag", resume="free"
    )
    resume_ckpt_tag: Optional[str] = opt(
        None, "folder name of the checkpoint inside resume_ckpt_load_dir", resume="free"
    )

    # where
    device: str = opt("auto", "auto = CUDA if there is one, else CPU", choices=("auto", "cpu", "cuda"), resume="free")
    world_size: Optional[int] = opt(None, "ranks", unused="torchrun's environment decides", resume="free")
    dist_url: Optional[str] = opt(None, "rendezvous address", unused="torchrun's environment decides", resume="free")
    distributed: Optional[bool] = opt(
        None, "more than one rank", unused="torchrun's environment decides", resume="free"
    )
    num_stages: int = opt(
        1, "stages of a pipeline (pipeline_runner); ranks are a multiple of it", at_least=1, resume="free"
    )
    stage_blocks: list[int] = opt([], "blocks of the LLM in each stage; empty = balanced by cost", resume="free")
    deepspeed_config: dict[str, Any] = opt(
        {}, "section handed to DeepSpeed (deepspeed_runner, pipeline_runner)", resume="free"
    )
