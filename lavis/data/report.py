"""What became of rows: how many are used, and which problems the others have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lavis.core.types import RowError

EXAMPLES = 5
"""Messages kept for each kind of problem."""


@dataclass
class Problems:
    """Rows with one kind of problem: how many, and what the first ones' errors say."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class PrepareReport:
    """What became of the rows of a split. `dropped` is by kind of problem."""

    rows: int = 0
    kept: int = 0
    dropped: dict[str, Problems] = field(default_factory=dict)

    def drop(self, error: RowError) -> None:
        """Count a row that cannot be used."""
        self.add(error.reason, Problems(1, [str(error)]))

    def add(self, reason: str, problems: Problems) -> None:
        """Count rows with a kind of problem, whose messages come after those that are there."""
        known = self.dropped.setdefault(reason, Problems())
        known.count += problems.count
        known.examples += problems.examples[: EXAMPLES - len(known.examples)]

    def merge(self, later: PrepareReport) -> None:
        """Count what became of later rows of the same split."""
        self.rows += later.rows
        self.kept += later.kept
        for reason, problems in later.dropped.items():
            self.add(reason, problems)

    @property
    def num_dropped(self) -> int:
        """Rows that cannot be used."""
        return sum(p.count for p in self.dropped.values())

    def summary(self) -> str:
        """One line: rows kept, and dropped by kind of problem."""
        kinds = ", ".join(f"{p.count} x {reason}" for reason, p in self.dropped.items())
        return f"{self.kept} of {self.rows} rows kept" + (f"; dropped: {kinds}" if kinds else "")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrepareReport:
        """What `dataclasses.asdict` made of one."""
        dropped = {reason: Problems(**p) for reason, p in values["dropped"].items()}
        return cls(values["rows"], values["kept"], dropped)
