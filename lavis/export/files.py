"""Exporters of what was trained alone: the original's model.pth, and peft's adapter folder."""

from __future__ import annotations

from pathlib import Path

from lavis.core.registries import EXPORTERS
from lavis.export.base import Exporter, Precision, Written
from lavis.export.trained import Trained, export_peft, export_pth
from lavis.models.configs import VlmConfig


@EXPORTERS.register("pth")
class PthExporter(Exporter):
    """The original's model.pth, which holds any tensors but adapters."""

    format = "pth"

    def problem(self, config: VlmConfig) -> str | None:
        """See Exporter; adapters are found in the checkpoint."""
        return None

    def write(self, trained: Trained, target: Path, *, precision: Precision, max_shard_size: str) -> Written:
        return Written(target, (export_pth(trained, target),))


@EXPORTERS.register("peft")
class PeftExporter(Exporter):
    """LoRA adapters of the LLM, and beside them what else was trained."""

    format = "peft"

    def problem(self, config: VlmConfig) -> str | None:
        """See Exporter; whether there are adapters is seen in the checkpoint."""
        return None

    def write(self, trained: Trained, target: Path, *, precision: Precision, max_shard_size: str) -> Written:
        return Written(target, tuple(export_peft(trained, target)))
