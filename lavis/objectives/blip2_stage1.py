"""BLIP-2's first stage: contrastive, matching and generation losses on image-caption pairs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lavis.core.registries import TASKS
from lavis.core.types import Batch
from lavis.objectives.base import Task
from lavis.weights.tensors import write_tensors


@TASKS.register("blip2_stage1")
class Blip2Stage1(Task):
    """Trains the vision tower's Q-Former (and the ViT, unless frozen) against captions.

    Losses are means over images.
    """

    archs = ("blip2_qformer",)

    def count(self, batch: Batch) -> int:
        """Images, one caption each."""
        return batch.num_samples

    def export(self, model: nn.Module, folder: Path, dtype: torch.dtype) -> list[Path]:
        """`stage1.safetensors`: everything, the text branch and heads included."""
        return [write_tensors(model.state_dict(), folder / "stage1.safetensors", dtype)]
