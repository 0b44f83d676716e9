"""Checkpoints: only what is trained, complete or not there at all.

    <run>/checkpoints/step-N/
        trainable.safetensors    trained tensors, by name
        optimizer.safetensors    optimiser state, `<slot>.<name>`
        state.json               counters, loss scale, identity of the frozen weights
        config.yaml              the resolved recipe
        COMPLETE                 written last: size of every file above, and the validation loss

A checkpoint is written beside its place, flushed to disk, then renamed; one without a truthful COMPLETE is never read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lavis.config.schema import ModelConfig
from lavis.core.errors import CheckpointError
from lavis.core.json_file import read_json
from lavis.core.paths import resolve
from lavis.weights.tensors import read_tensors

MARKER = "COMPLETE"
_HASHED_WHOLE = 16 << 20


@dataclass(frozen=True)
class TrainState:
    """Counters from which training goes on: everything else is a pure function of them and the recipe.

    `step`: optimiser steps done; `global_batch`: rows per optimiser step; `frozen`: identity of each frozen weight
    file.
    """

    step: int
    global_batch: int
    loss_scale: dict[str, Any] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)
    valid_loss: float | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. Reading one that has been deleted or damaged since raises CheckpointError."""

    path: Path
    step: int
    valid_loss: float | None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The trained tensors, on the CPU."""
        return read_tensors(self.path / "trainable.safetensors")

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """The optimiser's state, on the CPU."""
        return read_tensors(self.path / "optimizer.safetensors")

    def state(self) -> TrainState:
        return TrainState(**read_json(self.path / "state.json"))


def save_checkpoint(
    folder: Path,
    state: TrainState,
    tensors: dict[str, torch.Tensor],
    optimizer_tensors: dict[str, torch.Tensor],
    config_yaml: str,
) -> Checkpoint:
    """Write `folder`/step-N. An existing complete one of the same step is kept as it is."""
    target = folder / f"step-{state.step}"
    if found := _read_marker(target):
        return found
    shutil.rmtree(target, ignore_errors=True)
    temp = folder / f".tmp-step-{state.step}-{os.getpid()}"
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temp / "trainable.safetensors")
    save_file({k: v.detach().cpu().contiguous() for k, v in optimizer_tensors.items()}, temp / "optimizer.safetensors")
    (temp / "state.json").write_text(json.dumps(asdict(state), indent=1))
    (temp / "config.yaml").write_text(config_yaml)
    sizes = {f.name: f.stat().st_size for f in sorted(temp.iterdir())}
    for name in sizes:
        _fsync(temp / name)
    marker = {"step": state.step, "valid_loss": state.valid_loss, "files": sizes}
    (temp / MARKER).write_text(json.dumps(marker, indent=1))
    _fsync(temp / MARKER)
    _fsync(temp)
    temp.rename(target)
    _fsync(folder)
    return Checkpoint(target, state.step, state.valid_loss)


def complete_checkpoints(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints in `folder`, oldest first; unfinished or damaged ones are passed over."""
    found = [_read_marker(p) for p in folder.glob("step-*")] if folder.is_dir() else []
    return sorted((c for c in found if c), key=lambda c: c.step)


def best_checkpoint(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """The one with the lowest validation loss, if any was validated."""
    judged = [c for c in checkpoints if c.valid_loss is not None]
    return min(judged, key=lambda c: c.valid_loss or 0.0, default=None)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one, and what unfinished writes left behind."""
    checkpoints = complete_checkpoints(folder)
    kept = {c.path for c in checkpoints[-keep:]}
    if best := best_checkpoint(checkpoints):
        kept.add(best.path)
    for stale in [*(c.path for c in checkpoints if c.path not in kept), *folder.glob(".tmp-step-*")]:
        shutil.rmtree(stale)


def drop_later(folder: Path, step: int) -> None:
    """Delete the checkpoints after `step`: training goes on from there, and theirs is another future."""
    for path in folder.glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


def find_checkpoint(where: Path) -> Checkpoint:
    """The checkpoint at `where`: a step folder itself, or the newest complete one of a run folder.

    Raises CheckpointError when there is none.
    """
    if found := _read_marker(where):
        return found
    checkpoints = complete_checkpoints(where / "checkpoints")
    if not checkpoints:
        raise CheckpointError(
            f"no complete checkpoint in {where}: give a run's folder or one of its checkpoints/step-N."
        )
    return checkpoints[-1]


def newest_run(output_dir: Path, accept: Callable[[Path], bool]) -> Checkpoint | None:
    """The newest complete checkpoint of the newest run under `output_dir` for which `accept(run folder)`; None when
    there is none.
    """
    runs = (
        sorted((p for p in output_dir.iterdir() if (p / "checkpoints").is_dir()), reverse=True)
        if output_dir.is_dir()
        else []
    )
    for run in runs:
        checkpoints = complete_checkpoints(run / "checkpoints")
        if checkpoints and accept(run):
            return checkpoints[-1]
    return None


def identity(path: Path) -> str:
    """A short fingerprint of a weight file or model folder: names, sizes and contents, without documentation and hidden
    files.

    Of files over 16 MiB the first and last MiB count; for safetensors the first holds the index of all tensors.
    """
    digest = hashlib.sha256()
    files = (
        sorted(f for f in path.rglob("*") if f.is_file() and not _is_about(f.relative_to(path)))
        if path.is_dir()
        else [path]
    )
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as f:
            if size > _HASHED_WHOLE:
                digest.update(f.read(1 << 20))
                f.seek(-1 << 20, os.SEEK_END)
            digest.update(f.read())
    return digest.hexdigest()[:16]


def frozen_files(model: ModelConfig) -> dict[str, Path]:
    """Key of the `model` section to file or folder of the weights that training does not change."""
    named = {file.key.removeprefix("model."): resolve(file.name) for file in model.files()}
    return {key: path for key, path in named.items() if path.exists()}


def _is_about(path: Path) -> bool:
    """Whether a file only tells of a model: readme, licence, hidden files."""
    return (
        any(part.startswith(".") for part in path.parts)
        or path.suffix == ".md"
        or path.name.upper().startswith(("LICENSE", "NOTICE"))
    )


def _read_marker(path: Path) -> Checkpoint | None:
    """The checkpoint in `path` if it is complete: marker there, readable, and every file of the size it says."""
    if not re.fullmatch(r"step-\d+", path.name) or not (path / MARKER).is_file():
        return None
    try:
        marker = json.loads((path / MARKER).read_text())
        sizes = {name: (path / name).stat().st_size for name in marker["files"]}
    except (json.JSONDecodeError, KeyError, OSError):
        return None
    return Checkpoint(path, marker["step"], marker["valid_loss"]) if sizes == marker["files"] else None


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
