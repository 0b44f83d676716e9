"""The shapes world as sources of data: generated under cache/dataset/shapes when first asked for."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from lavis.config.schema import DataEntry
from lavis.core.errors import ConfigError, DataError, did_you_mean
from lavis.core.paths import cache_root
from lavis.core.registries import SOURCES
from lavis.data.shapes.build import ShapesSpec, ensure_shapes
from lavis.data.sources import FileSource

_ALIASES = {"valid": "val"}


class ShapesSource(FileSource):
    """A part of the shapes world: that which the entry's `split` names."""

    parts: ClassVar[dict[str, str]]

    def __init__(self, entry: DataEntry, key: str, split: str) -> None:
        super().__init__(entry, key, split)
        self.root = cache_root() / "dataset" / "shapes"
        self._spec = _shapes_spec(f"{key}.generate", entry.generate)

    @classmethod
    def has_images(cls, entry: DataEntry) -> bool:
        """Yes: it makes them itself."""
        return True

    @property
    def image_root(self) -> Path | None:
        """The folder of the pictures."""
        return self.root / "images"

    def files(self) -> list[Path]:
        """The file of the part, generated if need be. Raises DataError for a part that is not there."""
        part = _ALIASES.get(self.split, self.split)
        if part not in self.parts:
            hint = did_you_mean(part, self.parts)
            raise DataError(
                f"{self.key}.split: {self.entry.source} has no part {part!r}.{hint} It has: {', '.join(self.parts)}."
            )
        return [ensure_shapes(self.root, self._spec) / self.parts[part]]


@SOURCES.register("shapes_instruction")
class ShapesInstruction(ShapesSource):
    """Captions, questions and dialogues about pictures; the pictures of `test` show held-out combinations.

    `interviews` are those of `train`, each with a question of every kind in one dialogue: most answers for the compute.
    """

    parts: ClassVar = {"train": "train.json", "interviews": "interviews.json", "val": "val.json", "test": "test.json"}


@SOURCES.register("shapes_caption")
class ShapesCaption(ShapesSource):
    """Pictures with a caption in either language."""

    parts: ClassVar = {"train": "captions.json"}


@SOURCES.register("shapes_text")
class ShapesText(ShapesSource):
    """Dialogues about scenes described in words."""

    parts: ClassVar = {"train": "text_train.json", "val": "text_val.json"}

    @classmethod
    def has_images(cls, entry: DataEntry) -> bool:
        """No."""
        return False

    @property
    def image_root(self) -> Path | None:
        """None: there are no images."""
        return None


def _shapes_spec(key: str, generate: dict[str, Any]) -> ShapesSpec:
    known = [field.name for field in fields(ShapesSpec)]
    for name in generate:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f"{key} has no key {name!r}.{hint} Known: {', '.join(known)}.")
    return ShapesSpec(**generate)
