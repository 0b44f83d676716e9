"""What a run trained, found by its folder, a checkpoint's, or the file itself."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lavis.core.errors import CheckpointError
from lavis.core.paths import resolve
from lavis.weights.tensors import read_tensors

FILE, MARKER = "trainable.safetensors", "COMPLETE"


def read_trained(source: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of `source`, by the names in it. Raises CheckpointError if there is no such run or file."""
    return read_tensors(trained_file(source))


def trained_file(source: str | Path) -> Path:
    """The weight file that `source` means: itself, that of a checkpoint's folder, or of a run's best checkpoint (its
    last where none was validated); of a recipe's output_dir, that of the newest run in it that has one.
    """
    path = Path(source).expanduser()
    path = path if path.exists() else resolve(source)
    if not path.is_dir():
        return path.absolute()
    if (path / FILE).is_file():
        return (path / FILE).absolute()
    found = _checkpoints(path) or _checkpoints(max(filter(_checkpoints, _folders(path)), default=path))
    if not found:
        raise CheckpointError(
            f"{source} holds no trained parts: give a run's folder, one of its checkpoints/step-N, or a weight file."
        )
    return (min(found, key=_order) / FILE).absolute()


def _folders(path: Path) -> list[Path]:
    return [folder for folder in path.iterdir() if folder.is_dir()]  # a run's is named by its time


def _checkpoints(run: Path) -> list[Path]:
    return [folder for folder in (run / "checkpoints").glob("step-*") if (folder / MARKER).is_file()]


def _order(checkpoint: Path) -> tuple[float, int]:
    """Sorts by validation loss, then newest first."""
    marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    loss = marker["valid_loss"]
    return (float("inf") if loss is None else loss, -marker["step"])
