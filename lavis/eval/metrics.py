"""Numbers that judge answers.

A metric of one's own is a class with a `name` and a `score`, registered in METRICS:

    @METRICS.register("mean_length")
    class MeanLength:
        name = "mean_length"

        def score(self, answers):
            return {"mean_length": sum(len(a.answer) for a in answers) / len(answers)}
"""

from __future__ import annotations

import traceback
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

from lavis.core.errors import TrainingError
from lavis.core.registries import METRICS
from lavis.eval.answers import Answer


class Metric(Protocol):
    """Judges all answers of a split together. `name` is the registered one."""

    name: str

    def score(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Name to number; names of parts begin with the metric's own: `accuracy/lang=en`."""


def judged(metric: Metric, answers: Sequence[Answer]) -> dict[str, float]:
    """What `metric` says of `answers`. Raises TrainingError naming it if it fails or gives no numbers."""
    try:
        scores = {name: float(value) for name, value in metric.score(answers).items()}
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise TrainingError(
            f"the metric {metric.name!r} fails: {type(error).__name__}: {error} ({line.filename}:{line.lineno}). The"
            " answers are written; correct it and evaluate again."
        ) from error
    return scores


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
