"""Changes of single entries of the lists data.train, data.valid and data.test from a layer above."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

Plain = dict[str, Any]
_LISTS = ("train", "valid", "test")


def change_entries(layers: Sequence[Plain]) -> list[tuple[str, str]]:
    """Make `data.train.0.weight=2` or `data.train.NAME.weight=2` of a layer the list of those below it, so changed.

    The layers are changed in place. Returns (key, message) of what changes no entry.
    """
    wrong: list[tuple[str, str]] = []
    below: dict[str, list[Any]] = {}
    for layer in layers:
        data = layer.get("data")
        if not isinstance(data, dict):
            continue
        for name in _LISTS:
            value = data.get(name)
            if isinstance(value, Mapping):
                data[name] = value = _changed(below.get(name, []), value, f"data.{name}", wrong)
            if isinstance(value, list):
                below[name] = value
    return wrong


def _changed(entries: list[Any], changes: Mapping[Any, Any], key: str, wrong: list[tuple[str, str]]) -> list[Any]:
    entries = copy.deepcopy(entries)
    for which, change in changes.items():
        found = [e for i, e in enumerate(entries) if str(which) in (str(i), e.get("name"), e.get("source"))]
        if not found:
            names = ", ".join(f"{i} ({e.get('name') or e.get('source', 'files')})" for i, e in enumerate(entries))
            wrong.append((f"{key}.{which}", f"there is no such entry (there are: {names or 'none'}); {key} is a list"))
        for entry in found:
            _merge(entry, change)
    return entries


def _merge(entry: Plain, change: Any) -> None:
    for name, value in change.items() if isinstance(change, Mapping) else ():
        if isinstance(value, Mapping) and isinstance(entry.get(name), dict):
            _merge(entry[name], value)
        else:
            entry[name] = copy.deepcopy(value)
