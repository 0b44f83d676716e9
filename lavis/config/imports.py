"""The `imports` of a recipe: Python of the user's own, executed before the names in the recipe are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import ListConfig

from lavis.config.layers import Layer, line_of
from lavis.core.errors import ConfigError
from lavis.core.plugins import COPIES as KEY
from lavis.core.plugins import Import, find_import, find_saved_import, load_plugins


def load_imports(layers: Sequence[Layer]) -> tuple[Import, ...]:
    """Execute installed plug-ins and what the layers of a recipe import, those of its bases first.

    Files are looked for beside the recipe that names them, then in the working directory. The key is taken out of the
    layers. Raises ConfigError for what is missing or cannot be imported.
    """
    load_plugins()
    found: dict[str, Import] = {}
    for layer in layers:
        place = f"{layer.label}:{line_of(layer.path, KEY)}" if layer.path else layer.label
        folders = [*([layer.path.absolute().parent] if layer.path else []), Path.cwd()]
        for name in _names(layer, place):
            found[name] = find_import(name, folders, place)
            found[name].load()
    return tuple(found.values())


def load_saved_imports(layer: Layer, config: Path) -> tuple[Import, ...]:
    """As `load_imports`, for the recipe that was saved as `config` with a run or a checkpoint."""
    load_plugins()
    found = tuple(find_saved_import(name, config) for name in _names(layer, str(config)))
    for item in found:
        item.load()
    return found


def _names(layer: Layer, place: str) -> Iterator[str]:
    values = layer.values.pop(KEY, None)
    for name in values if isinstance(values, ListConfig) else [] if values is None else [values]:
        if not isinstance(name, str):
            raise ConfigError(f"{KEY} ({place}): {name!r} is neither a file ending in .py nor a module.")
        yield name
