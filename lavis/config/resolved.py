"""A recipe that has been read: its typed sections, and where each value comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lavis.config.compat import leaves
from lavis.config.layers import Layer, where
from lavis.config.schema import DataConfig, ModelConfig
from lavis.config.sections import (
    CheckpointConfig,
    EvalConfig,
    ExportConfig,
    LogConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from lavis.config.typed import field_types, iter_fields
from lavis.core.plugins import COPIES as IMPORTS
from lavis.core.plugins import Import, copy_imports


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe. `origins` says for each dotted key where its value comes from."""

    model: ModelConfig
    init: list[Any]
    data: DataConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    train: TrainConfig
    parallel: ParallelConfig
    eval: EvalConfig
    log: LogConfig
    checkpoint: CheckpointConfig
    export: ExportConfig
    run: RunConfig
    source: Path
    origins: dict[str, str]
    imports: tuple[Import, ...] = ()
    layers: Sequence[Layer] = dataclasses.field(default=(), repr=False, compare=False)

    def sections(self) -> dict[str, Any]:
        """Name of a section to what is in it."""
        return {name: getattr(self, name) for name in SECTIONS}

    def to_dict(self) -> dict[str, Any]:
        """The sections as plain values; `recipe_from_dict` reads them back."""
        imports = {IMPORTS: [item.name for item in self.imports]} if self.imports else {}
        return imports | {name: _plain(section) for name, section in self.sections().items()}

    def to_yaml(self) -> str:
        """The sections as YAML, in the schema's order."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def save(self, folder: Path) -> None:
        """Write it into the folder of a run, with the files it imports; `load_saved` reads it back."""
        (folder / "config.yaml").write_text(self.to_yaml(), encoding="utf-8")
        copy_imports(self.imports, folder)

    def flat(self) -> dict[str, Any]:
        """Dotted key to value; lists and empty mappings count as values."""
        return dict(leaves(self.to_dict()))

    def fields(self) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
        """(dotted key, schema field, value) of every section and key."""
        for name, section in self.sections().items():
            if dataclasses.is_dataclass(section):
                yield from iter_fields(section, name)

    def place(self, key: str) -> str:
        """The origin of `key`, with the line if it is a file."""
        label = self.origins[key]
        at = where(key, self.layers) if self.layers else label
        return at if at.startswith(f"{label}:") else label

    def kept_on_resume(self) -> dict[str, Any]:
        """As `flat`, without what may change when a run is resumed."""
        free = [f"{IMPORTS}.", *(f"{key}." for key, field, _ in self.fields() if field.metadata["resume"] == "free")]
        rows = {"data.train": [entry.meaning("train") for entry in self.data.train]}
        return {key: value for key, value in (self.flat() | rows).items() if not f"{key}.".startswith(tuple(free))}


SECTIONS: dict[str, Any] = {
    name: hint for name, hint in field_types(Recipe).items() if name not in ("source", "origins", "imports", "layers")
}
"""Name of a section to its type."""


def _plain(section: Any) -> Any:
    return dataclasses.asdict(section) if dataclasses.is_dataclass(section) else section  # type: ignore[arg-type]
