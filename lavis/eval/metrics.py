"""Numbers that judge answers.

A metric of one's own is a class with a `name` and a `score`, registered in METRICS:

    @METRICS.register("mean_length")
    class MeanLength:
        name = "mean_length"

        def score(self, answers):
            return {"mean_length": sum(len(a.answer) for a in answers) / len(answers)}
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

from lavis.core.registries import METRICS
from lavis.eval.answers import Answer


class Metric(Protocol):
    """Judges all answers of a split together. `name` is the registered one."""

    name: str

    def score(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Name to number; names of parts begin with the metric's own: `accuracy/lang=en`."""


@METRICS.register("accuracy")
class Accuracy:
    """Share of answers that equal the expected one but for case, white space and final punctuation."""

    name = "accuracy"

    def score(self, answers: Sequence[Answer]) -> dict[str, float]:
        """`accuracy`, and the same by `kind` and `lang` where the data names them."""
        groups: dict[str, list[bool]] = defaultdict(list)
        for a in answers:
            groups["accuracy"].append(a.correct)
            for label in ("kind", "lang"):
                if value := getattr(a, label):
                    groups[f"accuracy/{label}={value}"].append(a.correct)
        return {name: sum(hits) / len(hits) for name, hits in sorted(groups.items())}
