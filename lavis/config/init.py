"""The `init` section of a recipe: what parts of a model start from, beside the files of their own sections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PARTS = ("tower", "connector", "llm")


@dataclass(frozen=True)
class Init:
    """Where parts start from: `source` is a run's folder, a checkpoint's, a weight file, or the folder of a whole model
    (save_pretrained's, LLaVA's); `parts` none: all that it holds something of.
    """

    source: str
    parts: tuple[str, ...] = ()

    @classmethod
    def read(cls, values: Any, key: str) -> tuple[Init | None, list[str]]:
        """An entry of a recipe's `init`, and what is wrong with it."""
        if not isinstance(values, Mapping) or not isinstance(values.get("from"), str):
            want = "a mapping with `from` (a run, checkpoint, model folder or file) and `parts`"
            return None, [f"{key} is {values!r}: give {want}."]
        parts = values.get("parts") or []
        parts = [parts] if isinstance(parts, str) else list(parts)
        problems = (
            [f"{key}.parts is empty: name {', '.join(PARTS)}, or leave it out."] if values.get("parts") == [] else []
        )
        problems += [f"{key}.{name}: unknown key; known: from, parts." for name in values.keys() - {"from", "parts"}]
        problems += [f"{key}.parts: {name!r} is not one of {', '.join(PARTS)}." for name in parts if name not in PARTS]
        return cls(values["from"], tuple(parts)), problems


def inits(values: list[Any]) -> list[Init]:
    """The entries of a recipe's `init`, which were checked."""
    return [item for i, entry in enumerate(values) if (item := Init.read(entry, f"init.{i}")[0])]
