"""Changes of single entries of the lists data.train, data.valid and data.test from a layer above."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from lavis.config.layers import Layer
from lavis.config.typed import Problem

_LISTS = ("train", "valid", "test")


def with_changed_entries(layers: Sequence[Layer]) -> tuple[list[Layer], list[Problem]]:
    """The layers, in which `data.train.0.weight=2` or `data.train.NAME.weight=2` has become the changed list.

    The problems name what changes no entry.
    """
    problems: list[Problem] = []
    below: dict[str, list[Any]] = {}
    result = []
    for layer in layers:
        data = layer.plain.get("data")
        changed = {}
        for name in _LISTS if isinstance(data, Mapping) else ():
            value = data.get(name)
            if isinstance(value, Mapping):
                value = changed[name] = _changed(below.get(name, []), value, f"data.{name}", problems)
            if isinstance(value, list):
                below[name] = value
        plain = {**layer.plain, "data": {**data, **changed}} if changed and isinstance(data, Mapping) else None
        result.append(dataclasses.replace(layer, values=OmegaConf.create(plain)) if plain else layer)
    return result, problems


def _changed(entries: list[Any], changes: Mapping[Any, Any], key: str, problems: list[Problem]) -> list[Any]:
    entries = copy.deepcopy(entries)
    for which, change in changes.items():
        found = [e for i, e in enumerate(entries) if str(which) in (str(i), e.get("name"), e.get("source"))]
        if not found:
            names = ", ".join(f"{i} ({e.get('name') or e.get('source', 'files')})" for i, e in enumerate(entries))
            problems.append(Problem(f"{key}.{which}", f"there is no such entry (there are: {names or 'none'})"))
        for entry in found:
            _merge(entry, change)
    return entries


def _merge(entry: dict[str, Any], change: Any) -> None:
    for name, value in change.items() if isinstance(change, Mapping) else ():
        if isinstance(value, Mapping) and isinstance(entry.get(name), dict):
            _merge(entry[name], value)
        else:
            entry[name] = copy.deepcopy(value)
