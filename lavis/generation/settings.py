"""How an answer is generated: typed settings, checked when they are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from lavis.config.typed import Problem, field_types, read_value
from lavis.core.errors import ChatError, did_you_mean

if TYPE_CHECKING:
    from transformers import GenerationConfig

MAX_NEW_TOKENS = 512
"""Longest answer by default, as in the original's demos."""
LIMITS: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, 32_768),
    "num_beams": (1, 10),
    "temperature": (0.01, 10),
    "top_p": (0.01, 1),
    "top_k": (0, 1_000_000),
    "repetition_penalty": (0.1, 10),
}
"""Smallest and largest allowed value."""


@dataclass(frozen=True)
class GenerationSettings:
    """max_new_tokens: longest answer, tokens; do_sample: draw tokens instead of taking the likeliest; num_beams: above
    1 a beam search, which
    shows its answer at the end; temperature, top_p and top_k (0 = off) shape what is drawn from; repetition_penalty:
    above 1 makes tokens that
    were there already less likely.

    Raises ChatError for a value out of its LIMITS.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    do_sample: bool = False
    num_beams: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 50
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise ChatError(f"{name}={value}: give {least:g} to {most:g}.")

    @classmethod
    def of_model(cls, config: GenerationConfig) -> GenerationSettings:
        """What the model's makers recommend, but greedy."""
        values = {name: getattr(config, name, None) for name in ("temperature", "top_p", "top_k", "repetition_penalty")}
        return cls().with_values({name: value for name, value in values.items() if value is not None})

    def with_values(self, values: Mapping[str, Any]) -> GenerationSettings:
        """These settings with `values` in place of some.

        Raises ChatError for an unknown name, a wrong type or a value out of its limits.
        """
        hints, read, problems = field_types(GenerationSettings), {}, list[Problem]()
        for name, value in values.items():
            if name not in hints:
                raise ChatError(f"there is no setting {name!r}.{did_you_mean(name, hints)} Known: {', '.join(hints)}.")
            read[name] = read_value(hints[name], value, name, problems)
        if problems:
            raise ChatError(f"{problems[0].key}: {problems[0].message}.")
        return dataclasses.replace(self, **read)

    def with_text(self, text: str) -> GenerationSettings:
        """As `with_values`, from `name=value` pairs between spaces or commas."""
        values = {}
        for pair in text.replace(",", " ").split():
            name, equals, value = pair.partition("=")
            if not equals:
                raise ChatError(f"{pair!r}: write name=value, such as top_p=0.9.")
            try:
                values[name] = yaml.safe_load(value)
            except yaml.YAMLError:
                values[name] = value
        return self.with_values(values)

    def __str__(self) -> str:
        return "  ".join(f"{name}={str(value).lower()}" for name, value in dataclasses.asdict(self).items())
