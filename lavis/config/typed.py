"""Plain values (from YAML) into the schema's dataclasses. What does not fit is collected, to be reported at once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lavis.core import registries
from lavis.core.errors import RegistryError, did_you_mean
from lavis.core.registry import Registry

REGISTRIES: dict[str, Registry[Any]] = {
    "objective": registries.OBJECTIVES,
    "strategy": registries.STRATEGIES,
    "processor": registries.PROCESSORS,
    "source": registries.SOURCES,
    "media_format": registries.MEDIA_FORMATS,
    "lr_schedule": registries.LR_SCHEDULES,
    "metric": registries.METRICS,
    "optimizer": registries.OPTIMIZERS,
}
"""What the `registry` of a schema field refers to."""


@dataclass(frozen=True)
class Problem:
    """A value that does not fit. `siblings` are the valid names beside an unknown key, None for other problems."""

    key: str
    message: str
    siblings: tuple[str, ...] | None = None


def type_name(hint: Any) -> str:
    """A type hint in a user's words: `whole number`, `list of text`, `text or null`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in args if a is not type(None)]
        return " or ".join([*map(type_name, inner), "null"])
    if origin is list:
        return f"list of {type_name(args[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "mapping"
    return {int: "whole number", float: "number", bool: "true or false", str: "text"}.get(hint, "any value")


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name to its resolved type hint."""
    return typing.get_type_hints(cls)


def chosen(cls: type, values: Mapping[str, Any]) -> type:
    """The dataclass of a section with these values: that of the part which its `name` names, if `cls` has a `choose`.

    `choose(values)` is a class method that returns a subclass, or raises RegistryError for an unknown name.
    """
    return cls.choose(values) if hasattr(cls, "choose") else cls


class Choice(typing.NamedTuple):
    """A section that names a part: its dotted key, the name where none is given, and whether null means no part."""

    key: str
    default: str
    optional: bool


def choices(hint: Any, key: str) -> Iterator[Choice]:
    """The sections at `key` of the type `hint`, and just inside it, that name a part."""
    section = section_type(hint)
    if section is None:
        return
    inside = [(join(key, name), inner) for name, inner in field_types(section).items()]
    for at, inner in [(key, hint), *inside]:
        part = section_type(inner)
        if part is not None and hasattr(part, "choose"):
            yield Choice(at, chosen(part, {})().name, optional=inner is not part)


def defaults(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a section as plain values. Which keys it has can depend on the parts that `values` name."""
    with contextlib.suppress(RegistryError):  # `read_dataclass` reports it
        cls = chosen(cls, values)
    result = dataclasses.asdict(cls())
    for name, hint in field_types(cls).items():
        section, inner = section_type(hint), values.get(name)
        if section is not None and isinstance(inner, Mapping):
            result[name] = defaults(section, inner)
    return result


def section_type(hint: Any) -> type | None:
    """The dataclass in `hint`, also if it may be null; None for other types."""
    args = [a for a in typing.get_args(hint) if a is not type(None)]
    inner = args[0] if typing.get_origin(hint) in (typing.Union, types.UnionType) else hint
    return inner if isinstance(inner, type) and dataclasses.is_dataclass(inner) else None


def read_dataclass(cls: type, value: Any, key: str, problems: list[Problem]) -> Any:
    """An instance of `cls` from a mapping (null: all defaults); appends to `problems` what does not fit at `key`."""
    if value is None:
        return cls()
    if not isinstance(value, Mapping):
        problems.append(Problem(key, f"{value!r} is not a mapping"))
        return cls()
    try:
        cls = chosen(cls, value)
    except RegistryError as error:
        problems.append(Problem(join(key, "name"), str(error).rstrip(".")))
        return cls()
    hints = field_types(cls)
    problems += [Problem(join(key, name), "unknown key", tuple(hints)) for name in value if name not in hints]
    given = [f for f in dataclasses.fields(cls) if f.name in value]
    return cls(**{f.name: _read_field(f, hints[f.name], value[f.name], join(key, f.name), problems) for f in given})


def _read_field(field: dataclasses.Field[Any], hint: Any, value: Any, key: str, problems: list[Problem]) -> Any:
    before = len(problems)
    value = read_value(hint, value, key, problems)
    if len(problems) > before or not field.metadata:
        return value
    choices, registry, least = (field.metadata[k] for k in ("choices", "registry", "at_least"))
    for item in value if isinstance(value, list) else [value]:
        if choices is not None and item not in choices:
            allowed = ["null" if c is None else str(c) for c in choices]
            hint = did_you_mean(str(item), allowed)
            problems.append(Problem(key, f"{item!r} is not one of: {', '.join(allowed)}.{hint}"))
        if registry is not None and item is not None and item not in REGISTRIES[registry]:
            kind, known = REGISTRIES[registry].kind, REGISTRIES[registry].list()
            hint = did_you_mean(item, known)
            problems.append(Problem(key, f"unknown {kind} {item!r}.{hint} Known: {', '.join(known)}"))
        if least is not None and item is not None and item < least:
            problems.append(Problem(key, f"{item!r} is below the smallest allowed value, {least:g}"))
    return value


def read_value(hint: Any, value: Any, key: str, problems: list[Problem]) -> Any:
    """`value` as the type `hint`. Null is an empty list or mapping; 3 passes for a number, 1e3 for a whole number."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else read_value(args[0], value, key, problems)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return read_dataclass(hint, value, key, problems)
    if origin is dict and (value is None or isinstance(value, Mapping)):
        return {str(k): read_value(args[1], v, join(key, k), problems) for k, v in (value or {}).items()}
    if origin is list and (value is None or isinstance(value, list)):
        return [read_value(args[0], v, join(key, i), problems) for i, v in enumerate(value or [])]
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint is int and type(value) is float and value.is_integer():
        return int(value)
    if type(value) is hint:
        return value
    quote = " (put it in quotes)" if hint is str and isinstance(value, (bool, int, float)) else ""
    problems.append(Problem(key, f"{value!r} has the wrong type: expected {type_name(hint)}{quote}"))
    return value


def iter_fields(instance: Any, key: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """(dotted key, field, value) of a dataclass instance and those inside it, sections before what they hold."""
    for f in dataclasses.fields(instance):
        value, name = getattr(instance, f.name), join(key, f.name)
        yield name, f, value
        if dataclasses.is_dataclass(value):
            yield from iter_fields(value, name)


def join(key: str, name: Any) -> str:
    """Dotted key of `name` inside `key`."""
    return f"{key}.{name}" if key else str(name)
