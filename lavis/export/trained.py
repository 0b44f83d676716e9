"""What a run trained, in the dialects that hold no frozen weights: the original's model.pth and peft's adapter folder.

Neither builds a model: the checkpoint has all that is written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file

from lavis.config.recipe import Recipe, load_saved
from lavis.core.errors import CheckpointError
from lavis.core.paths import resolve
from lavis.models.configs import VlmConfig
from lavis.runs.checkpoint import Checkpoint, best_checkpoint, complete_checkpoints, find_checkpoint
from lavis.weights.lavis_names import original_names
from lavis.weights.qwen1_format import is_qwen1, qwen1_names, qwen2_names
from lavis.weights.tensors import write_tensors

Tensors = dict[str, torch.Tensor]
LLM = "llm_model."


@dataclass(frozen=True)
class Trained:
    """A complete checkpoint and the recipe it was made with."""

    checkpoint: Checkpoint
    recipe: Recipe

    @property
    def model(self) -> VlmConfig:
        """The recipe's `model` section. Raises CheckpointError if it is of a model without an LLM."""
        model: Any = self.recipe.model
        if model.row_format != "chat":
            raise CheckpointError(
                f"{self.checkpoint.path} is of a {model.arch}: only models with an LLM are exported. Others are written"
                " by export.path at the end of a run."
            )
        return model

    @property
    def run_folder(self) -> Path:
        """The folder of the run."""
        return self.checkpoint.path.parent.parent


def open_run(where: str | Path) -> Trained:
    """The checkpoint in `where`: a step folder itself, or a run folder's best, or its last when none was validated.

    Raises CheckpointError when there is none, or none of a model with an LLM.
    """
    trained = open_any_run(where)
    assert trained.model
    return trained


def open_any_run(where: str | Path) -> Trained:
    """As `open_run`, of whatever model."""
    where = Path(where).absolute()
    checkpoint = best_checkpoint(complete_checkpoints(where / "checkpoints")) or find_checkpoint(where)
    return Trained(checkpoint, load_saved(checkpoint.path / "config.yaml"))


def export_pth(trained: Trained, target: Path) -> Path:
    """Write `{"model": {...}}` of what was trained under the original's names; `target` is the file, or the folder of a
    model.pth.

    Raises CheckpointError for LoRA adapters, which that file has no place for.
    """
    tensors = trained.checkpoint.tensors()
    if adapters := [name for name in tensors if ".lora_" in name]:
        raise CheckpointError(
            f"{trained.checkpoint.path} holds LoRA adapters ({adapters[0]}, ...), which the original's model.pth has no"
            " place for: use `lavis export peft`, or `lavis export hf`, which merges them."
        )
    file = target if target.suffix == ".pth" else target / "model.pth"
    file.parent.mkdir(parents=True, exist_ok=True)
    qwen1 = is_qwen1(resolve(trained.model.llm.weights or ""))
    torch.save({"model": original_tensors(tensors, first_generation=qwen1)}, file)
    return file


def original_tensors(tensors: Tensors, *, first_generation: bool = False) -> Tensors:
    """`tensors` under the original's names; a trained LLM's under those of first-generation Qwen if it is one."""
    renamed = original_names(tensors)
    return _with_qwen1_names(renamed) if first_generation else renamed


def _with_qwen1_names(tensors: Tensors) -> Tensors:
    """Inverse of lavis.weights.qwen1_format.with_qwen2_names for an LLM trained in full."""
    layers = {int(m[1]) for name in tensors if (m := re.match(r"llm_model\.model\.layers\.(\d+)\.", name))}
    tensors = dict(tensors)
    for name in qwen1_names(len(layers)):
        parts = [tensors.pop(LLM + part) for part in qwen2_names(name) if LLM + part in tensors]
        if parts:
            tensors[LLM + name] = torch.cat(parts)
    return tensors


def export_peft(trained: Trained, folder: Path) -> list[Path]:
    """Write the LLM's adapters as peft does, and beside them projection.safetensors: all else that was trained, under
    our names.

    Returns the files. Raises CheckpointError when the run trained no adapters of the LLM.
    """
    tensors = trained.checkpoint.tensors()
    adapters = {_peft_name(name): t for name, t in tensors.items() if name.startswith(LLM) and ".lora_" in name}
    if not adapters:
        raise CheckpointError(
            f"{trained.checkpoint.path} holds no LoRA adapters of the LLM (model.llm.train is"
            f" {trained.model.llm.train}): use `lavis export hf`, or `lavis export pth` for the projection."
        )
    from peft import LoraConfig

    llm = trained.model.llm
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=llm.weights,
        r=llm.lora.rank,
        lora_alpha=cast(int, llm.lora.alpha),  # any number will do
        lora_dropout=llm.lora.dropout,
        target_modules=sorted({name.split(".")[-3] for name in adapters}),
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(adapters, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    rest = {name: t for name, t in tensors.items() if not name.startswith(LLM)}
    if rest or trained.model.sees:
        write_tensors(rest, folder / "projection.safetensors", torch.float32)
    return sorted(folder.iterdir())


def _peft_name(name: str) -> str:
    """Name of an adapter's tensor in peft's file, which knows neither where the LLM stands here nor its adapter."""
    return "base_model.model." + name.removeprefix(LLM).replace(".default.", ".")
