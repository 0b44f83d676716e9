"""Image-text training: answers to questions about images, learned through whichever parts are not frozen."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lavis.core.registries import TASKS
from lavis.objectives.base import Task
from lavis.weights.tensors import write_tensors


@TASKS.register("deepspeed_image_text_pretrain")
@TASKS.register("image_text_pretrain")
class ImageTextPretrain(Task):
    """Next-token loss on the answers of conversations with images."""

    archs = ("vlm",)
    generates = True

    def export(self, model: nn.Module, folder: Path, dtype: torch.dtype) -> list[Path]:
        """`tower.safetensors`: the vision tower, Q-Former and the projection it was trained with."""
        tensors = {k: v for k, v in model.state_dict().items() if not k.startswith("llm_model.")}
        return [write_tensors(tensors, folder / "tower.safetensors", dtype)]
