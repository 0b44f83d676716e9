"""Packing samples into rows of a fixed length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lavis.core.errors import DataError

WINDOW = 4096
"""Samples that are sorted together. Longest-first fills rows best; shuffled windows keep what shares a row random."""


def pack(lengths: Sequence[int] | np.ndarray, capacity: int, seed: int) -> list[list[int]]:
    """Rows of sample indices, each row at most `capacity` tokens, each sample in one row.

    Best fit, longest first, within windows of samples shuffled by `seed`; holes left by a window are filled by later
    ones.
    The result depends on the arguments alone. O(n log n). Raises DataError if a sample is longer than `capacity`.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > capacity:
        raise DataError(
            f"a sample of {lengths.max()} tokens does not fit into packed rows of {capacity}. "
            "Raise data.pack_length to at least model.max_length."
        )
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by their number of free positions
    rooms = 0  # bit r is set when a row has r free positions
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        window = window[np.argsort(-lengths[window], kind="stable")]
        for index, length in zip(window.tolist(), lengths[window].tolist(), strict=True):
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1  # the lowest bit: the least room that is enough
                row = with_room[room].pop()
                rooms ^= 0 if with_room[room] else 1 << room
                rows[row].append(index)
            else:
                room, row = capacity, len(rows)
                rows.append([index])
            if room > length:
                with_room[room - length].append(row)
                rooms |= 1 << (room - length)
    return rows
