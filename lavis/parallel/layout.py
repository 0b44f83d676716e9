"""The ways to lay a run out over ranks."""

from __future__ import annotations

from dataclasses import dataclass

BUCKET_BYTES = 64 << 20
"""Gradients are summed over ranks in flat pieces of about this size."""


@dataclass(frozen=True)
class Layout:
    """How a run lies on ranks: a whole model on each (`stages` 1), its state split by ZeRO stage `zero`, or pipelines
    of `stages`.
    """

    ranks: int
    stages: int = 1
    zero: int = 0

    @property
    def replicas(self) -> int:
        """How many micro-batches are worked on independently."""
        return self.ranks // self.stages

    def __str__(self) -> str:
        if self.stages > 1:
            return f"pipeline of {self.stages}" + (f", {self.replicas} of them" if self.replicas > 1 else "")
        if self.zero:
            return f"ZeRO-{self.zero}, {self.ranks} ranks"
        return f"data-parallel, {self.ranks} ranks" if self.ranks > 1 else "one rank"
