"""Packing loses nothing, overfills nothing, fills well, and is a function of its seed."""

from __future__ import annotations

import time

import numpy as np
import pytest

from lavis.core.errors import DataError
from lavis.data.packing import pack


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [0, 1, 37, 9000])
def test_every_sample_once_and_no_row_too_long(n: int, seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 300, n)
    rows = pack(lengths, 300, seed)
    assert sorted(i for row in rows for i in row) == list(range(n))
    assert all(lengths[row].sum() <= 300 for row in rows)
    assert rows == pack(lengths, 300, seed)
    if n == 9000:
        assert lengths.sum() / (300 * len(rows)) > 0.98
        assert rows != pack(lengths, 300, seed + 1)


def test_a_hundred_thousand_samples_in_seconds() -> None:
    lengths = np.random.default_rng(0).integers(20, 500, 100_000)
    start = time.perf_counter()
    pack(lengths, 2048, 0)
    assert time.perf_counter() - start < 2


def test_too_long_a_sample_is_told() -> None:
    with pytest.raises(DataError, match="data.pack_length"):
        pack([3, 11], 10, 0)
