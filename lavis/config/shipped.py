"""Recipes by name: those of the package, and the recipes that another one is based on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import ListConfig

from lavis.config.layers import Layer, label, line_of, read_layer
from lavis.core.errors import ConfigError, did_you_mean
from lavis.core.paths import PROJECTS_ROOT


def shipped_recipes() -> dict[str, Path]:
    """Short name (`shapes/align`) to file of every recipe in the package."""
    files = sorted(PROJECTS_ROOT.rglob("*.yaml"))
    return {p.relative_to(PROJECTS_ROOT).with_suffix("").as_posix(): p for p in files}


def shipped_name(path: str | Path) -> str:
    """The short name that `path` would be, if it is that of a shipped recipe."""
    return Path(path).as_posix().removeprefix("lavis/projects/").removesuffix(".yaml")


def find_recipe(path: str | Path) -> Path:
    """The file that `path` means: itself if it exists, else the shipped recipe of that name.

    Raises ConfigError naming the nearest shipped recipes.
    """
    file = Path(path).expanduser()
    if file.is_file():
        return file
    shipped, name = shipped_recipes(), shipped_name(file)
    if name in shipped:
        return shipped[name]
    hint = did_you_mean(name, shipped)
    raise ConfigError(f"no recipe {str(path)!r}, neither a file nor shipped.{hint} See `lavis configs list`.")


def recipe_layers(file: Path) -> list[Layer]:
    """The recipe in `file` above those that its `base` names, lowest first. A base of several is there once.

    Raises ConfigError for a base that is not there, and for bases in a circle.
    """
    layers: dict[Path, Layer] = {}
    _collect(file, [], layers)
    return list(layers.values())


def _collect(file: Path, chain: Sequence[Path], layers: dict[Path, Layer]) -> None:
    chain, key = [*chain, file], file.resolve()
    if key in [above.resolve() for above in chain[:-1]]:
        raise ConfigError(f"recipes are based on each other in a circle: {' -> '.join(map(label, chain))}.")
    if key in layers:
        return
    layer = read_layer(file)
    for name in _names(layer):
        _collect(find_base(name, file), chain, layers)
    layers[key] = layer


def _names(layer: Layer) -> list[str]:
    """What `base` of the layer says; it is taken out of its values."""
    base = layer.values.pop("base", None)
    names = list(base) if isinstance(base, ListConfig) else [] if base is None else [base]
    for name in names:
        if not isinstance(name, str):
            at = f"{layer.label}:{line_of(layer.path, 'base')}" if layer.path else layer.label
            raise ConfigError(f"base ({at}): {name!r} is no recipe: give a file or the name of a shipped one.")
    return names


def find_base(name: str, recipe: Path) -> Path:
    """The file that `name` means as a base of the file `recipe`: beside it, else shipped."""
    own = recipe.parent / Path(name).expanduser()
    for file in (own, own.with_name(f"{own.name}.yaml")):
        if file.is_file():
            return file
    shipped = shipped_recipes()
    if shipped_name(name) in shipped:
        return shipped[shipped_name(name)]
    hint = did_you_mean(shipped_name(name), shipped)
    at = f"{label(recipe)}:{line_of(recipe, 'base')}"
    raise ConfigError(f"base ({at}): no recipe {name!r}, neither a file beside this one nor shipped.{hint}")


def movable_text(file: Path) -> str:
    """The text of a recipe; the bases and Python files it names are found from any other folder too."""
    text = file.read_text(encoding="utf-8")
    root, shipped = yaml.compose(text), shipped_recipes()
    names = [(node, _portable(find_base(node.value, file))) for node in _scalars(root, "base")]
    own = [(node, file.parent / node.value) for node in _scalars(root, "imports")]
    names += [(node, str(path.resolve())) for node, path in own if path.is_file()]
    for node, name in sorted(names, key=lambda pair: -pair[0].start_mark.index):  # the last one first
        if node.value not in shipped:
            text = text[: node.start_mark.index] + json.dumps(name, ensure_ascii=False) + text[node.end_mark.index :]
    return text


def _portable(file: Path) -> str:
    """The short name of a shipped recipe, the absolute path of another."""
    own = {path.resolve(): name for name, path in shipped_recipes().items()}
    return own.get(file.resolve(), str(file.resolve()))


def _scalars(node: yaml.Node | None, key: str) -> list[yaml.ScalarNode]:
    """The values in the text of a top-level key that has one or a list."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    values = [value for name, value in pairs if name.value == key]
    items = [inner for v in values for inner in (v.value if isinstance(v, yaml.SequenceNode) else [v])]
    return [item for item in items if isinstance(item, yaml.ScalarNode)]
