"""The data order: the samples of each optimiser step, as a pure function of seed, epoch and global batch size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lavis.core.errors import DataError
from lavis.data.packing import pack

Row = list[int]
"""Sample indices that share a row: one, or several that are packed."""
MEGA_CHUNK = 50
"""Global batches among which samples are sorted by length: enough to find equals, few enough to stay random."""
LENGTH_STEP = 32
"""Tokens within which lengths count as equal. Sorted by the exact length, rows of short texts would share their words
too: a step of
captions that all say "triangle" teaches nothing about triangles."""
_PACKING, _CYCLE = 1, 2  # keep the random streams of one seed apart


class StepPlan:
    """Deals samples to optimiser steps, ranks and micro-batches.

    A global batch is `batch_size * accum * world_size` rows; a row is a sample, or with `pack_length` a packed bin of
    samples.
    What is in global step s of epoch e depends on (seed, e, size of the global batch) alone, not on how that splits up.

    lengths: [n] tokens of each sample, the datasets one after the other; dataset_sizes: samples of each.
    length_grouping: put rows of like length (to LENGTH_STEP tokens) into the same step. Packed rows are of one length
    anyway.
    ratios: share of each dataset in an epoch of unchanged size; each goes through its own shuffled cycle. None takes
    all once.
    tokens: most tokens of a micro-batch. A rank's rows of a step then go through in as few micro-batches as hold them,
    on all ranks equally many, instead of in `accum` of `batch_size` rows.
    Raises DataError if there is less than one global batch.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        batch_size: int,
        accum: int,
        world_size: int,
        seed: int,
        length_grouping: bool,
        pack_length: int | None,
        dataset_sizes: list[int],
        ratios: list[float] | None,
        tokens: int | None = None,
    ) -> None:
        self.tokens = tokens
        self.batch_size, self.accum, self.world_size, self.seed = batch_size, accum, world_size, seed
        self.pack_length = pack_length
        self.global_batch = batch_size * accum * world_size
        self._grouping = length_grouping and pack_length is None
        pools = _pools(np.asarray(lengths), dataset_sizes, pack_length, seed, separate=ratios is not None)
        self._pool_sizes = [len(pool) for pool in pools]
        self._samples, self._starts = _flatten([row for pool in pools for row in pool])  # arrays, which workers share
        sums = np.concatenate(([0], np.cumsum(np.asarray(lengths)[self._samples], dtype=np.int64)))
        self._row_lengths = sums[self._starts[1:]] - sums[self._starts[:-1]]
        if ratios is not None and not (min(ratios) >= 0 < max(ratios)):
            raise DataError(f"the ratios of the datasets are {ratios}. None may be negative, one must be positive.")
        self._counts = _shares(self.num_rows, ratios or self._pool_sizes)
        self.steps_per_epoch = self.num_rows // self.global_batch
        self._cached: tuple[int, np.ndarray] | None = None
        if not self.steps_per_epoch:
            raise DataError(
                f"{self.num_rows} rows of training data are less than one global batch of {self.global_batch} "
                f"({batch_size} per micro-batch x {accum} micro-batches x {world_size} ranks). "
                "Lower train.micro_batch_size or train.accumulation, or take more data."
            )

    @property
    def num_rows(self) -> int:
        """Rows of an epoch, before the last partial global batch is dropped."""
        return len(self._row_lengths)

    def micro_batches(self, epoch: int, step: int, rank: int) -> list[list[Row]]:
        """The micro-batches that `rank` takes in this step, of `batch_size` rows or at most `tokens` tokens each.

        Rows of like length share a micro-batch, and at each micro-batch the ranks get neighbours in length.
        """
        rows = self._epoch(epoch)[step]
        if self.tokens:
            own = self._dealt(rows, rank).reshape(-1)
            return [
                [self._row(own[i]) for i in part]
                for part in _even(self._row_lengths[own], self._parts(rows, self.tokens))
            ]
        return [[self._row(r) for r in part] for part in self._dealt(rows, rank)]

    def _parts(self, rows: np.ndarray, tokens: int) -> int:
        """The least number of micro-batches in which every rank's share of a step's `rows` is within `tokens`."""
        shares = [self._row_lengths[self._dealt(rows, rank).reshape(-1)] for rank in range(self.world_size)]
        count = max(1, *(-(-int(share.sum()) // tokens) for share in shares))
        while count < len(shares[0]) and any(
            share[part].sum() > tokens for share in shares for part in _even(share, count)
        ):
            count += 1
        return count

    def _dealt(self, rows: np.ndarray, rank: int) -> np.ndarray:
        """Those of a step's `rows` that `rank` takes, [accum, batch_size]."""
        rows = rows[np.argsort(self._row_lengths[rows], kind="stable")].reshape(
            self.accum, self.world_size, self.batch_size
        )
        # Every other micro-batch is dealt backwards, so that no rank has the longer rows throughout.
        places = [rank if a % 2 == 0 else self.world_size - 1 - rank for a in range(self.accum)]
        return np.stack([rows[a, place] for a, place in enumerate(places)])

    def _row(self, index: int) -> Row:
        return self._samples[self._starts[index] : self._starts[index + 1]].tolist()

    def _epoch(self, epoch: int) -> np.ndarray:
        """Row indices [steps_per_epoch, global_batch] of an epoch."""
        if self._cached is None or self._cached[0] != epoch:
            generator = _generator(self.seed, epoch)
            # What is cut off here differs from epoch to epoch, so that over several no row is left out.
            order = generator.permutation(self._drawn(epoch))[: self.steps_per_epoch * self.global_batch]
            if self._grouping:
                chunk = MEGA_CHUNK * self.global_batch
                parts = (order[i : i + chunk] for i in range(0, len(order), chunk))
                order = np.concatenate(
                    [part[np.argsort(self._row_lengths[part] // LENGTH_STEP, kind="stable")] for part in parts]
                )
                # short steps first and long ones last would be a curriculum that nobody asked for
                order = generator.permutation(order.reshape(-1, self.global_batch))
            self._cached = epoch, order.reshape(-1, self.global_batch)
        return self._cached[1]

    def _drawn(self, epoch: int) -> np.ndarray:
        """The rows of an epoch in no particular order: the next ones from each pool's endless cycle of permutations."""
        drawn, offset = [], 0
        for pool, (size, count) in enumerate(zip(self._pool_sizes, self._counts, strict=True)):
            first, last = epoch * count, (epoch + 1) * count
            cycles = range(first // size, -(-last // size)) if count else range(0)
            order = [_generator(self.seed, _CYCLE, pool, cycle).permutation(size) for cycle in cycles]
            if order:
                begin = first - cycles[0] * size
                drawn.append(offset + np.concatenate(order)[begin : begin + count])
            offset += size
        return np.concatenate(drawn)


def _generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(list(seed)))


def _pools(
    lengths: np.ndarray, sizes: list[int], pack_length: int | None, seed: int, separate: bool
) -> list[list[Row]]:
    """Rows by the pool they are drawn from: one of all datasets, or one for each (then a bin holds one dataset's
    samples).
    """
    pools, offset = [], 0
    for pool, size in enumerate(sizes if separate else [sum(sizes)]):
        if pack_length is None:
            pools.append([[i] for i in range(offset, offset + size)])
        else:
            bins = pack(
                lengths[offset : offset + size], pack_length, seed=int(_generator(seed, _PACKING, pool).integers(2**32))
            )
            pools.append([[offset + i for i in members] for members in bins])
        offset += size
    return pools


def _even(lengths: np.ndarray, count: int) -> list[list[int]]:
    """Indices of rows in `count` parts of like many tokens: the longest first, each to the part that has least."""
    parts: list[list[int]] = [[] for _ in range(count)]
    sums = [0] * count
    for i in np.argsort(-lengths, kind="stable").tolist():
        least = sums.index(min(sums))
        parts[least].append(i)
        sums[least] += int(lengths[i])
    return [sorted(part) for part in parts]


def _flatten(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """All members, and where each row begins among them (with the end appended)."""
    members = np.fromiter((i for row in rows for i in row), dtype=np.int64)
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return members, starts


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` divided by `weights`, rounded by largest remainder."""
    exact = np.asarray(weights, dtype=np.float64) * total / sum(weights)
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")[: total - counts.sum()]
    counts[largest] += 1
    return counts.tolist()
