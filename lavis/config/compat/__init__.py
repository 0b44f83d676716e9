"""Every older spelling of a recipe (MiniGPT4Qwen's, LAVIS's and this program's first one), translated in one place.

`RENAMES` of the modules below map a dotted key to the one it is called now, value unchanged; `rules` of them turn
several old keys into new ones. Both are applied to all layers of a recipe at once, since what an old key means can
depend on another that a different layer sets (`get_lora` in the recipe, `lora_parts` among the options); each result
lands in the topmost layer that set one of the keys it came from, so that origins and precedence stay true.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from lavis.config.compat import data, model, run
from lavis.config.compat.outcome import Wrong

_MODULES = (model, data, run)
RENAMES: dict[str, str] = {old: new for module in _MODULES for old, new in module.RENAMES.items()}
"""Old dotted key to new one. A key of a mapping stands for all below it."""
UNUSED: dict[str, str] = run.UNUSED
"""Old dotted keys that say nothing any more, and why."""

Plain = dict[str, Any]


class Translated(NamedTuple):
    """What became of older spellings: the layers' values in today's, and (old key, new key) of each that was found."""

    layers: list[Plain]
    found: list[tuple[str, str]]
    wrong: list[Wrong]


def translate(layers: Sequence[Mapping[str, Any]]) -> Translated:
    """The plain values of a recipe's layers, lowest first, without older spellings. The arguments are not changed."""
    new = [copy.deepcopy(dict(layer)) for layer in layers]
    result = Translated(new, [], [])
    for module in _MODULES:
        _apply_rules(module, result)
        for layer in new:
            for old in module.CONSUMED:
                _take(layer, old)
        for layer, written in zip(new, layers, strict=True):
            _rename(module.RENAMES, layer, written, result)
    return Translated([_with_references(layer) for layer in new], list(dict.fromkeys(result.found)), result.wrong)


def _rename(names: Mapping[str, str], layer: Plain, written: Mapping[str, Any], result: Translated) -> None:
    for old, target in names.items():
        if not holds(layer, old):
            continue
        value = _take(layer, old)
        if isinstance(value, (str, bool)):  # 1 is no `true`, though Python says so
            value = run.VALUES.get(old, {}).get(value, value)
        if holds(written, target) and not isinstance(value, Mapping):
            result.wrong.append(Wrong(old, f"is the older name of {target}, which stands here too: keep one of them"))
        _put(layer, target, value)
        result.found.append((old, target))


def _apply_rules(module: ModuleType, result: Translated) -> None:
    merged = _merged(result.layers)
    for outcome in module.rules(merged):
        if isinstance(outcome, Wrong):
            result.wrong.append(outcome)
            continue
        key, value, sources = outcome
        top = max(i for i, layer in enumerate(result.layers) for source in sources if holds(layer, source))
        _put(result.layers[top], key, value)
        result.found.extend((source, key) for source in sources if holds(merged, source))


def _merged(layers: Sequence[Plain]) -> Plain:
    merged: Plain = {}
    for layer in layers:
        _merge(merged, layer)
    return merged


def _merge(below: Plain, above: Mapping[str, Any]) -> None:
    for name, value in above.items():
        if isinstance(value, Mapping) and isinstance(below.get(name), dict):
            _merge(below[name], value)
        elif value is not None or not isinstance(below.get(name), dict):  # a section without contents says nothing
            below[name] = copy.deepcopy(value)


def holds(values: Mapping[str, Any], key: str) -> bool:
    """Whether `values` has the dotted `key`."""
    node: Any = values
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True


def _take(values: Plain, key: str) -> Any:
    """Remove the dotted `key` and return its value; None if it is not there. Sections it leaves empty stay."""
    node: Any = values
    *path, last = key.split(".")
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    return node.pop(last, None) if isinstance(node, dict) else None


def _put(values: Plain, key: str, value: Any) -> None:
    """Set the dotted `key`. A mapping is laid under what the new spelling says there already."""
    node = values
    *path, last = key.split(".")
    for part in path:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    if isinstance(value, dict) and isinstance(node.get(last), dict):
        above = node[last]
        node[last] = copy.deepcopy(value)
        _merge(node[last], above)
    else:
        node[last] = value


def _with_references(value: Any) -> Any:
    """`value` with `${old.key}` inside texts spelt as today."""
    if isinstance(value, dict):
        return {name: _with_references(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_references(inner) for inner in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    return re.sub(r"\$\{([\w.\-]+)\}", lambda m: "${" + _renamed(m[1]) + "}", value)


def _renamed(key: str) -> str:
    """`key`, or what stands for it or for a section around it in RENAMES."""
    names = RENAMES | run.REFERENCES
    head, tail = key, ""
    while head:
        if head in names:
            return names[head] + tail
        head, dot, last = head.rpartition(".")
        tail = f"{dot}{last}{tail}"
    return key


def older_names(section: str | None = None) -> list[str]:
    """Older dotted keys; of a section: the names just below it."""
    olds = dict.fromkeys([*RENAMES, *(key for module in _MODULES for key in module.CONSUMED)])
    if section is None:
        return list(olds)
    return [name for above, _, name in (key.rpartition(".") for key in olds) if above == section]


def other_names(key: str) -> list[str]:
    """What else the dotted `key` is called: its newer name, or its older ones."""
    names = RENAMES | run.REFERENCES
    return [names[key]] if key in names else [old for old, new in names.items() if new == key]


def leaves(values: Mapping[str, Any], key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all below `values`; lists and empty mappings count as values."""
    for name, value in values.items():
        full = f"{key}.{name}" if key else str(name)
        if isinstance(value, Mapping) and value:
            yield from leaves(value, full)
        else:
            yield full, value
