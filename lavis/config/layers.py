"""Layers of a recipe: each is one source of values, and knows where in it a key stands. Later ones win."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis.config.compat import holds, other_names, translate
from lavis.config.lists import change_entries
from lavis.config.typed import Problem
from lavis.core.errors import ConfigError
from lavis.core.logging import info_once
from lavis.core.paths import PACKAGE_ROOT

SCHEMA, OPTIONS = "schema", "--options"


@dataclass(frozen=True)
class Layer:
    """One source of values. `label` names it in messages and origins; `path` is None for the schema and the options.

    `written` is what it says in its own words and `renamed` the (old, new) keys of the recipe; see `translated`.
    """

    label: str
    values: DictConfig
    path: Path | None = None
    written: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()

    @functools.cached_property
    def plain(self) -> dict[str, Any]:
        """The values as dicts and lists, interpolations not filled in."""
        return cast("dict[str, Any]", OmegaConf.to_container(self.values))

    def spelling(self, key: str) -> str:
        """The dotted `key` as the user wrote it here: an older name of it where that is what stands here."""
        if holds(self.written, key):
            return key
        olds = [old + key[len(new) :] for old, new in self.renamed if f"{key}.".startswith(f"{new}.")]
        olds += [old for old, new in self.renamed if f"{key}.".startswith(f"{new}.")]
        return next((old for old in olds if holds(self.written, old)), key)


def translated(layers: Sequence[Layer]) -> tuple[list[Layer], list[Problem]]:
    """The layers of one recipe, lowest first, in today's spelling, and what has no translation."""
    plain = [layer.plain for layer in layers]
    new, found, wrong = translate(plain)
    problems = [Problem(key, message) for key, message in (*wrong, *change_entries(new))]
    result = [
        dataclasses.replace(layer, values=OmegaConf.create(values), written=written, renamed=tuple(found))
        for layer, values, written in zip(layers, new, plain, strict=True)
    ]
    return result, problems


def mention_renamed(layers: Sequence[Layer]) -> None:
    """Log, once, today's names of the older ones that stand in `layers`."""
    pairs = [pair for layer in layers for pair in layer.renamed if holds(layer.written, pair[0])]
    if pairs:
        names = ", ".join(f"{old} -> {new}" for old, new in dict.fromkeys(pairs))
        info_once(f"these keys have newer names: {names}.")


def read_layer(path: Path) -> Layer:
    """The YAML file at `path`. Raises ConfigError if it is none, or no mapping."""
    try:
        values = OmegaConf.load(path)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        raise ConfigError(f"{label(path)}:{mark.line + 1}: not valid YAML: {e.problem or e.context}.") from e
    except (yaml.YAMLError, UnicodeDecodeError, OSError, OmegaConfBaseException) as e:
        raise ConfigError(f"{label(path)}: can't be read as YAML: {e}") from e
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{label(path)}: a recipe is a mapping of sections such as model and run.")
    return Layer(label(path), values, path)


def options_layer(options: Sequence[str]) -> Layer:
    """The overrides `a.b=value`, of which the last one for a key counts, whichever of its names is used.

    Raises ConfigError naming the one that is not of this form.
    """
    values = OmegaConf.create()
    for option in options:
        key, equals, _ = option.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            raise ConfigError(f"option {option!r} is not of the form key.sub=value.")
        for other in other_names(key):
            _drop(values, other)
        try:
            values.merge_with_dotlist([option])
        except (yaml.YAMLError, OmegaConfBaseException, TypeError) as e:
            reason = str(e).splitlines()[0]
            raise ConfigError(f"option {option!r} can't be read: {reason}. Quote what is not plain YAML.") from e
    return Layer(OPTIONS, values)


def _drop(values: DictConfig, key: str) -> None:
    section, _, name = key.rpartition(".")
    inner = OmegaConf.select(values, section)
    if isinstance(inner, DictConfig):
        inner.pop(name, None)


def merged(layers: Sequence[Layer]) -> dict[str, Any]:
    """The values of all layers, later ones winning, interpolations not filled in."""
    return cast("dict[str, Any]", OmegaConf.to_container(_merged(layers)))


def _merged(layers: Sequence[Layer]) -> Any:
    try:
        return OmegaConf.merge(*(layer.values for layer in layers))
    except TypeError as e:
        raise ConfigError(_clash(layers) or str(e)) from e


def _clash(layers: Sequence[Layer]) -> str:
    """The first key at which one layer has a list and another a mapping, as a sentence."""
    seen: dict[str, tuple[str, int]] = {}
    for i, layer in enumerate(layers):
        for key, kind in _containers(layer.plain):
            before, above = seen.setdefault(key, (kind, i))
            if before != kind:
                (written, here), (_, there) = place(key, layers[: i + 1]), place(key, layers[: above + 1])
                return f"{written} ({here}) is a {kind}, but a {before} is expected ({there})."
    return ""


def _containers(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in node.items():
        if isinstance(value, list):
            yield f"{prefix}{name}", "list"
        elif isinstance(value, Mapping):
            yield f"{prefix}{name}", "mapping"
            yield from _containers(value, f"{prefix}{name}.")


def resolved(layers: Sequence[Layer], source: Path) -> dict[str, Any]:
    """The merged layers as plain values, interpolations filled in."""
    try:
        values = _merged(layers)
        return cast("dict[str, Any]", OmegaConf.to_container(values, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as e:
        raise ConfigError(f"{label(source)}: {e.full_key or 'a value'}: {str(e).splitlines()[0]}.") from e


def origin(key: str, layers: Sequence[Layer]) -> Layer:
    """The last layer that sets `key`, or sets a section around it to a plain value such as null."""
    for layer in reversed(layers[1:]):
        node: Any = layer.plain
        for part in key.split("."):
            if not isinstance(node, Mapping):
                return layer
            if part not in node:
                break
            node = node[part]
        else:
            return layer
    return layers[0]


def place(key: str, layers: Sequence[Layer]) -> tuple[str, str]:
    """(`key` as it is written, label of the layer that sets it with the line if it is a file)."""
    layer = origin(key, [nowhere := Layer(SCHEMA, OmegaConf.create()), *layers])
    if layer is nowhere:  # an older name, which is in no layer's values any more
        layer = next((above for above in reversed(layers) if holds(above.written, key)), nowhere)
    written = layer.spelling(key)
    if layer.path is None:
        return written, layer.label
    return written, f"{layer.label}:{line_of(layer.path, written)}"


def where(key: str, layers: Sequence[Layer]) -> str:
    """The second of `place`."""
    return place(key, layers)[1]


def line_of(path: Path, key: str) -> int:
    """The line of the dotted `key` in the YAML file, or of the innermost section around it that is there."""
    node, line = _composed(path.read_text(encoding="utf-8")), 0
    for part in key.split("."):
        pairs = {k.value: (k, v) for k, v in node.value} if isinstance(node, yaml.MappingNode) else {}
        if part not in pairs:
            break
        line, node = pairs[part][0].start_mark.line + 1, pairs[part][1]
    return line


@functools.lru_cache(maxsize=32)
def _composed(text: str) -> yaml.Node | None:
    return yaml.compose(text)


def label(path: Path) -> str:
    """A path as messages show it: files of the package as lavis/..., others as given."""
    absolute = path.absolute()
    return absolute.relative_to(PACKAGE_ROOT.parent).as_posix() if absolute.is_relative_to(PACKAGE_ROOT) else str(path)
