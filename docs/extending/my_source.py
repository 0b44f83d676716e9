"""A source of data of one's own: sums, written when they are asked for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from lavis.extend import SOURCES, DataEntry, FileSource, OnError, Row


@SOURCES.register("sums")
class Sums(FileSource):
    """`generate: {rows: 100, seed: 0}` of the entry says how many, and which."""

    @classmethod
    def has_images(cls, entry: DataEntry) -> bool:
        """No."""
        return False

    def files(self) -> list[Path]:
        """What the rows depend on beside this code and `generate`; when one changes, they are prepared again."""
        return []

    def rows(self, on_error: OnError | None = None) -> Iterator[tuple[str, Row]]:
        """Rows of any dialect, each with the name by which messages call it."""
        draw = random.Random(self.entry.generate.get("seed", 0))
        for number in range(self.entry.generate.get("rows", 100)):
            a, b = draw.randrange(100), draw.randrange(100)
            yield f"{self.name}:{number}", {"instruction": f"{a} + {b} =", "output": str(a + b)}
