"""The weight files of a Hugging Face folder, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lavis.core.errors import CheckpointError
from lavis.core.json_file import read_json
from lavis.core.paths import resolve
from lavis.weights.hub import fetch_model, local_folder
from lavis.weights.tensors import read_tensors

LAYOUTS = ("model.safetensors", "pytorch_model.bin")
"""Weight files that transformers writes, the preferred first; with `.index.json` behind the name, the list of its
shards.
"""


class Shards:
    """The tensors of `folder`: one weight file, or the shards that an index lists; pickles are read without running
    anything.

    `shapes` maps each tensor's name to its shape. Opening reads headers only. Raises CheckpointError, naming file and
    tensors, for a
    missing, truncated or unsafe file and for an index that doesn't tell the truth.
    """

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, torch.Size] = {}
        self._files: dict[str, Path] = {}
        for file, promised in _listing(folder).items():
            try:
                tensors = read_tensors(file)
            except CheckpointError as error:
                raise CheckpointError(f"{error} {_what_it_holds(promised)}".rstrip()) from error
            if absent := sorted(promised - tensors.keys()):
                raise CheckpointError(
                    f"{file} lacks {_some(absent)}, which the index of {folder} says it holds. Download the folder"
                    " again."
                )
            self.shapes |= {name: tensor.shape for name, tensor in tensors.items()}
            self._files |= dict.fromkeys(tensors, file)

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, mapped from its file: only what is used of it is read.

        Its file is opened again each time, so that no more than the tensors in use stays in memory.
        """
        return read_tensors(self._files[name])[name]


@dataclass(frozen=True)
class LazyTensor:
    """Rows of a tensor in `shards`, read when indexed: `lazy[...]` is a tensor of its own memory, as `dtype` or as the
    file has it.

    The rows are part number `part` of `parts` equal parts. transformers takes it where it takes a slice of a
    safetensors file.
    """

    shards: Shards
    name: str
    part: int = 0
    parts: int = 1
    dtype: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return self.shards.read(self.name).nbytes // self.parts

    def __getitem__(self, index: Any) -> torch.Tensor:
        rows = self.shards.read(self.name).chunk(self.parts)[self.part][index]
        return rows.to(self.dtype or rows.dtype, copy=True)


def read_source(name: str) -> dict[str, torch.Tensor]:
    """The tensors of a weight file, a folder, or a model's repository on the hub, which is fetched if need be.

    Relative paths: see lavis.core.paths.resolve. Raises CheckpointError or DownloadError.
    """
    if resolve(name).is_file():
        return read_tensors(name)
    shards = Shards(local_folder(name) or fetch_model(name))
    return {tensor: shards.read(tensor) for tensor in shards.shapes}


def _listing(folder: Path) -> dict[Path, set[str]]:
    """Weight files of `folder` with the names that the index promises in each."""
    for name in LAYOUTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            files: dict[Path, set[str]] = {}
            for tensor, shard in _weight_map(index).items():
                files.setdefault(folder / shard, set()).add(tensor)
            return files
        if (folder / name).is_file():
            return {folder / name: set()}
    raise CheckpointError(
        f"{folder} holds no weights: none of {', '.join(LAYOUTS)} and their .index.json. Put the model's weight files"
        " there."
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor to file, as `index` says."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f"{index} has no weight_map of tensors to files. Download it again.")
    return files


def _what_it_holds(promised: Collection[str]) -> str:
    return f"By the folder's index it holds {_some(sorted(promised))}." if promised else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
