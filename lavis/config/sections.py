"""The typed sections of a recipe beside `model` and the data: what is done, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Optional

from lavis.config.schema import opt
from lavis.core.registries import OBJECTIVES


@dataclass
class ObjectiveConfig:
    """What is trained for. An objective registered with a dataclass of settings has those keys too."""

    name: str = opt("sft", "name of the objective in the registry", registry="objective")

    @classmethod
    def choose(cls, values: Mapping[str, Any]) -> type[ObjectiveConfig]:
        """The dataclass of the objective that the section names."""
        return OBJECTIVES.config(str(values.get("name") or "sft"), cls)

    def problems(self) -> Iterator[str]:
        """Sentences about values of the section that cannot work together."""
        yield from ()


@dataclass
class OptimConfig:
    """The optimiser, and the learning rate over time."""

    name: str = opt(
        "adamw",
        "adamw; adamw_8bit: with 8-bit moments, of bitsandbytes; lion: wants a third of AdamW's lr and beta2 0.99;"
        " muon: for matrices, at AdamW's lr, and AdamW for the rest",
        registry="optimizer",
    )
    lr: float = opt(1e-4, "peak learning rate", at_least=0)
    min_lr: float = opt(1e-6, "learning rate at the end of the decay", at_least=0)
    schedule: str = opt("linear_warmup_cosine_lr_step-wise", "learning-rate schedule", registry="lr_schedule")
    warmup_lr: float = opt(0.0, "learning rate at the first step of the warm-up; -1 = lr")
    warmup_steps: int = opt(0, "optimiser steps of linear warm-up", at_least=0)
    warmup_ratio: Optional[float] = opt(None, "warm-up as a share of all steps; overrides warmup_steps", at_least=0)
    lr_decay_rate: Optional[float] = opt(None, "factor per epoch of linear_warmup_step_lr", at_least=0)
    layer_decay: float = opt(1.0, "factor per layer, from the top of the vision tower down", at_least=0)
    weight_decay: float = opt(0.05, "weight decay, times lr; not on 1-D tensors", at_least=0)
    beta1: float = opt(0.9, "beta1 of AdamW and Lion", at_least=0)
    beta2: float = opt(0.999, "beta2 of AdamW and Lion", at_least=0)
    eps: float = opt(1e-8, "AdamW epsilon", at_least=0)
    max_grad_norm: Optional[float] = opt(1.0, "largest norm of the gradient; null does not clip", at_least=0)


@dataclass
class TrainConfig:
    """How long and in what steps is trained, and in which precision.

    The batch may change when a run is resumed: only its product with the number of ranks matters, which is checked
    apart.
    """

    epochs: int = opt(10, "passes over the training data", at_least=1, resume="free")
    max_steps: Optional[int] = opt(
        None, "optimiser steps; ends training before `epochs` when reached", at_least=1, resume="free"
    )
    micro_batch_size: int = opt(
        1, "samples (packed: rows of pack_length) per rank and forward", at_least=1, resume="free"
    )
    accumulation: int = opt(1, "micro-batches per optimiser step", at_least=1, resume="free")
    micro_batch_tokens: Any = opt(
        "auto",
        "most tokens of a micro-batch: the samples of a rank and step (micro_batch_size x accumulation) go through in"
        " as few parts as hold them; null = micro_batch_size at a time; auto = what a GPU has room for under"
        " data_parallel, else null",
        resume="free",
    )
    global_batch_size: Optional[int] = opt(
        None,
        "samples (packed: rows) per optimiser step over all ranks; accumulation then follows from it",
        at_least=1,
        resume="free",
    )
    amp: bool = opt(True, "mixed precision on a GPU; the CPU trains in fp32 unless autocast_on_cpu")
    autocast_dtype: str = opt("bf16", "type of mixed precision", choices=("bf16", "fp16"))
    autocast_on_cpu: bool = opt(False, "mixed precision on the CPU too (bf16 only)")
    loss_scale: Optional[float] = opt(None, "fixed loss scale of fp16; null scales dynamically", at_least=1)


@dataclass
class ParallelConfig:
    """How the work is shared by several GPUs."""

    strategy: str = opt(
        "data_parallel",
        "data_parallel: a copy on each rank; zero: DeepSpeed ZeRO; pipeline: the LLM lies over several GPUs",
        registry="strategy",
        resume="free",
    )
    num_stages: int = opt(1, "stages of a pipeline; ranks are a multiple of it", at_least=1, resume="free")
    stage_blocks: list[int] = opt([], "blocks of the LLM in each stage; empty = balanced by cost", resume="free")
    deepspeed: dict[str, Any] = opt({}, "section handed to DeepSpeed (zero, pipeline)", resume="free")


@dataclass
class SamplePrompt:
    """A fixed question, answered before, during and after training."""

    image: Optional[str] = opt(None, "path of the image; null asks without one")
    prompt: str = opt("Describe this image.", "the question")


@dataclass
class EvalConfig:
    """What is measured beside the training loss."""

    batch_size: int = opt(16, "samples per rank and forward in validation and generation", at_least=1, resume="free")
    every: Optional[int] = opt(
        None, "optimiser steps between validations; null = once an epoch", at_least=1, resume="free"
    )
    before: bool = opt(False, "evaluate the test data before training as well", resume="free")
    blind: bool = opt(False, "evaluate the test data with the images removed as well", resume="free")
    metrics: list[str] = opt(["accuracy"], "what answers are scored by", registry="metric", resume="free")
    max_samples: Optional[int] = opt(None, "test samples of each split; null = all", at_least=1, resume="free")
    max_new_tokens: int = opt(
        64, "longest generated answer in evaluation and sample prompts, tokens", at_least=1, resume="free"
    )
    prompts: list[SamplePrompt] = opt([], "fixed questions answered before, during and after training", resume="free")
    num_prompts: int = opt(
        4,
        "without prompts: how many rows of the first test (else validation) data are asked",
        at_least=0,
        resume="free",
    )


@dataclass
class LogConfig:
    """What is said while training."""

    every: int = opt(10, "optimiser steps between log lines", at_least=1, resume="free")
    trackers: list[str] = opt(
        ["tensorboard"],
        "where metrics go beside metrics.jsonl",
        choices=("tensorboard", "wandb", "swanlab"),
        resume="free",
    )


@dataclass
class CheckpointConfig:
    """When what is trained is written down, so that training can go on from there."""

    every: Optional[int] = opt(
        None, "optimiser steps between checkpoints; null = once an epoch", at_least=1, resume="free"
    )
    keep: int = opt(2, "newest checkpoints kept, beside the best", at_least=1, resume="free")


@dataclass
class ExportConfig:
    """What later recipes load, written at the end of training."""

    path: Optional[str] = opt(
        None, "folder (relative: under cache/) that the trained parts are written to; null = none", resume="free"
    )
    dtype: str = opt("fp32", "type of floating-point tensors", choices=("fp32", "fp16", "bf16"), resume="free")


@dataclass
class RunConfig:
    """Where a run is and goes on from."""

    output_dir: str = opt("output/run", "each start makes a folder of its own in here, named by time", resume="free")
    resume: str = opt(
        "never",
        "never; auto = newest complete checkpoint under output_dir; or the path of a run or checkpoint",
        resume="free",
    )
    evaluate: bool = opt(False, "only evaluate, no training", resume="free")
    seed: int = opt(42, "seed of initialisation, data order and dropout", at_least=0)
    device: str = opt("auto", "auto = CUDA if there is one, else CPU", choices=("auto", "cpu", "cuda"), resume="free")
