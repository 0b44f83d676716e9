"""The files and folders that a recipe names: what they are for, where they belong, and whether they are there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from lavis.config.init import Init, inits
from lavis.core.paths import resolve

if TYPE_CHECKING:
    from lavis.config.resolved import Recipe
    from lavis.config.schema import DataEntry, ModelConfig

Kind = Literal["weights", "llm", "tokenizer", "annotations", "images", "checkpoint"]
MADE_HERE = "shapes/"
"""Begins the names of parts of the shapes world, which `lavis shapes build` makes."""
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".gguf"}


@dataclass(frozen=True)
class NeededFile:
    """A file or folder that a recipe names at the dotted `key`, spelt `name` there; `url` and `sha256` if the recipe
    gives them.
    """

    key: str
    kind: Kind
    name: str
    url: str | None = None
    sha256: str | None = None

    @property
    def on_hub(self) -> bool:
        """Whether `name` is no path but one on the Hugging Face hub."""
        path = Path(self.name).expanduser()
        like_path = (
            self.name.startswith(("ckpt/", MADE_HERE, ".")) or self.name.endswith(".gguf") or self.name.count("/") > 1
        )
        return (
            self.kind in ("llm", "tokenizer") and not (path.is_absolute() or like_path) and not resolve(path).exists()
        )

    @property
    def path(self) -> Path | None:
        """Where it is, or belongs (see lavis.core.paths.resolve); None for a name on the hub."""
        if self.on_hub:
            return None
        return Path(self.name).absolute() if self.kind == "checkpoint" else resolve(self.name)


def needed_files(recipe: Recipe) -> list[NeededFile]:
    """Every weight, LLM, tokenizer, annotation file, image folder and checkpoint that `recipe` names.

    A source of data that generates its rows needs none.
    """
    files = list(model_files(recipe.model))
    seen: set[tuple[str, str]] = set()
    for file in (file for key, entry in recipe.data.entries() for file in _entry_files(key, entry)):
        if (file.kind, file.name) not in seen:  # entries may share a file or an image folder
            seen.add((file.kind, file.name))
            files.append(file)
    files += [NeededFile(f"init.{i}.from", "checkpoint", _start(item)) for i, item in enumerate(inits(recipe.init))]
    if recipe.run.resume not in ("never", "auto"):
        files.append(NeededFile("run.resume", "checkpoint", recipe.run.resume))
    return files


def _start(init: Init) -> str:
    """Where a source of `init` is, or belongs: by itself, else under cache/."""
    path, cached = Path(init.source).expanduser(), resolve(init.source)
    return str(cached if cached.exists() and not path.exists() else path)


def missing_files(recipe: Recipe) -> list[tuple[str, Path]]:
    """(dotted key, path where it belongs) of what `recipe` needs and is not there; names on the hub are left out."""
    return missing_of(needed_files(recipe))


def missing_of(files: Iterable[NeededFile]) -> list[tuple[str, Path]]:
    """As `missing_files`, of these."""
    placed = [(file, path) for file in files if (path := file.path)]
    return [(file.key, path) for file, path in placed if not is_complete(path, file.kind)]


def is_complete(path: Path, kind: Kind) -> bool:
    """Whether `path` is a file, or a folder that holds anything; if it is an LLM's, weights with every shard that their
    index names.
    """
    if not path.is_dir():
        return path.exists()
    names = {p.name for p in path.iterdir() if not p.name.startswith(".")}
    if kind != "llm":
        return bool(names)
    index = path / "model.safetensors.index.json"
    if index.name in names:
        return names.issuperset(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return any(Path(name).suffix in _WEIGHT_SUFFIXES for name in names)


def model_files(model: ModelConfig) -> Iterator[NeededFile]:
    """What a `model` section names."""
    found = list(model.files())
    known = {file.name: file for file in reversed(found)}  # a file that two parts share is named once
    return (NeededFile(file.key, cast("Kind", file.kind), file.name) for file in found if known[file.name] is file)


def _entry_files(key: str, entry: DataEntry) -> Iterator[NeededFile]:
    for path, url, sha256 in entry.files():
        yield NeededFile(f"{key}.path", "annotations", path, url, sha256)
    if entry.images:
        yield NeededFile(f"{key}.images", "images", entry.images)
