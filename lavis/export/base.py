"""What an exporter is, and which one writes a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from lavis.core.errors import CheckpointError, did_you_mean
from lavis.core.registries import EXPORTERS
from lavis.export.trained import Trained
from lavis.models.configs import VlmConfig

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Written:
    """What was written.

    `differences`: probe prompts that transformers encodes otherwise than this program, normally none.
    """

    folder: Path
    files: tuple[Path, ...]
    differences: tuple[str, ...] = ()


class Exporter(ABC):
    """Writes what a run trained in a form that other programs read. `format` is what the command calls it: several
    exporters can share one, each for other models.
    """

    format: ClassVar[str] = "hf"
    whole: ClassVar[bool] = False
    """Whether it writes the frozen weights too: then a user may choose `precision` and `max_shard_size`."""

    @abstractmethod
    def problem(self, config: VlmConfig) -> str | None:
        """Why such a model can't be written in this form, in a sentence; None if it can."""

    @abstractmethod
    def write(self, trained: Trained, target: Path, *, precision: Precision, max_shard_size: str) -> Written:
        """Write `trained` to `target`; weights in files of at most `max_shard_size`.

        precision: of all weights; `auto` keeps a frozen LLM's as its own files have them and writes the rest in fp32.
        """


def exporter_for(format: str, config: VlmConfig) -> Exporter:
    """The exporter that writes such a model as `format`. Raises CheckpointError saying why none can."""
    problems = []
    for name in EXPORTERS.list():
        exporter: Exporter = EXPORTERS.get(name)()
        if exporter.format == format:
            problem = exporter.problem(config)
            if problem is None:
                return exporter
            problems.append(f"{name}: {problem}")
    why = " ".join(problems) or f"Known formats: {', '.join(formats())}.{did_you_mean(format, formats())}"
    raise CheckpointError(f"this model can't be exported as {format}. {why}")


def formats() -> list[str]:
    """Formats that some exporter writes."""
    return sorted({EXPORTERS.get(name).format for name in EXPORTERS.list()})
