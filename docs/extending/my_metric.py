"""A metric of one's own: how many of the expected words are in the answer."""

from __future__ import annotations

from collections.abc import Sequence

from lavis.extend import METRICS, Answer, normalize


@METRICS.register("word_recall")
class WordRecall:
    """Mean over the answers of a split of the share of expected words that were said, in any order."""

    name = "word_recall"

    def score(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Numbers by name; a part's name begins with the metric's own, such as `word_recall/lang=en`."""
        return {self.name: sum(map(_share, answers)) / len(answers)}


def _share(answer: Answer) -> float:
    expected, said = normalize(answer.expected).split(), set(normalize(answer.answer).split())
    return sum(word in said for word in expected) / max(1, len(expected))
