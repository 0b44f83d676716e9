"""The data order is a function of seed, epoch and global batch size, however ranks and micro-batches divide it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from lavis.core.errors import DataError
from lavis.data.sampler import StepPlan

LENGTHS = np.random.default_rng(0).integers(5, 200, 1003)
SPLITS = [(24, 1, 1), (1, 24, 1), (6, 4, 1), (3, 2, 4), (1, 3, 8), (12, 1, 2)]


def plan(batch_size: int = 24, accum: int = 1, world_size: int = 1, **changes: Any) -> StepPlan:
    options = {
        "seed": 7,
        "length_grouping": True,
        "pack_length": None,
        "dataset_sizes": [1003],
        "ratios": None,
        **changes,
    }
    return StepPlan(LENGTHS, batch_size=batch_size, accum=accum, world_size=world_size, **options)


def step_samples(p: StepPlan, epoch: int, step: int) -> list[int]:
    return sorted(
        i for rank in range(p.world_size) for m in p.micro_batches(epoch, step, rank) for row in m for i in row
    )


def epoch_samples(p: StepPlan, epoch: int) -> list[int]:
    return [i for step in range(p.steps_per_epoch) for i in step_samples(p, epoch, step)]


@pytest.mark.parametrize(
    "changes",
    [{}, {"length_grouping": False}, {"pack_length": 400}, {"dataset_sizes": [3, 1000], "ratios": [1, 3]}],
)
@pytest.mark.parametrize("split", SPLITS[1:])
def test_steps_do_not_depend_on_how_the_global_batch_splits(
    split: tuple[int, int, int], changes: dict[str, Any]
) -> None:
    one, other = plan(*SPLITS[0], **changes), plan(*split, **changes)
    assert one.steps_per_epoch == other.steps_per_epoch
    for epoch in (0, 3):
        for step in range(one.steps_per_epoch):
            assert step_samples(one, epoch, step) == step_samples(other, epoch, step)
    micro = other.micro_batches(0, 0, 0)
    assert len(micro) == split[1] and all(len(m) == split[0] for m in micro)


def test_an_epoch_takes_each_sample_at_most_once_and_drops_less_than_a_batch() -> None:
    p = plan()
    for epoch in range(3):
        samples = epoch_samples(p, epoch)
        assert len(set(samples)) == len(samples) == 1003 // 24 * 24


def test_epochs_and_seeds_differ() -> None:
    p, other = plan(), plan(seed=8)
    assert step_samples(p, 0, 0) != step_samples(p, 1, 0) != step_samples(other, 1, 0)


def test_resuming_at_a_step_gives_the_same_tail() -> None:
    p, fresh = plan(6, 2, 2), plan(6, 2, 2)
    whole = [p.micro_batches(2, step, 1) for step in range(p.steps_per_epoch)]
    assert [fresh.micro_batches(2, step, 1) for step in range(10, fresh.steps_per_epoch)] == whole[10:]


def test_micro_batches_are_of_like_length_and_ranks_balanced() -> None:
    p, loose = plan(4, 4, 4), plan(4, 4, 4, length_grouping=False)
    padding = dict.fromkeys((p, loose), 0)
    load = np.zeros((p.steps_per_epoch, 4))
    for q in padding:
        for step in range(q.steps_per_epoch):
            for rank in range(4):
                for rows in q.micro_batches(0, step, rank):
                    lengths = [LENGTHS[row[0]] for row in rows]
                    padding[q] += max(lengths) * len(lengths) - sum(lengths)
                    load[step, rank] += sum(lengths) if q is p else 0
    assert padding[p] < 0.03 * LENGTHS.sum() and padding[p] < padding[loose]
    assert (load.max(axis=1) / load.mean(axis=1)).max() < 1.1


def test_short_rows_are_not_sorted_by_their_exact_length() -> None:
    """Or a step would hold rows of the same words: the gradient of a step must not depend on one answer."""
    lengths = np.repeat([10, 11, 12, 13], 300)  # 300 times four answers, each with a length of its own
    options = {"batch_size": 24, "accum": 1, "world_size": 1, "seed": 7, "pack_length": None, "ratios": None}
    p = StepPlan(lengths, length_grouping=True, dataset_sizes=[1200], **options)
    for step in range(p.steps_per_epoch):
        assert len({lengths[i] for i in step_samples(p, 0, step)}) > 1


def test_packed_rows_hold_every_sample_once() -> None:
    p = plan(1, 1, 1, pack_length=400)
    rows = [row for step in range(p.steps_per_epoch) for row in p.micro_batches(0, step, 0)[0]]
    assert sorted(i for row in rows for i in row) == list(range(1003))
    assert max(LENGTHS[row].sum() for row in rows) <= 400
    other = [row for step in range(p.steps_per_epoch) for row in p.micro_batches(1, step, 0)[0]]
    assert rows != other and sorted(rows) == sorted(other)


def test_ratios_draw_each_dataset_in_its_own_cycle() -> None:
    p = plan(1, 1, 1, dataset_sizes=[100, 903], ratios=[0.5, 0.5])
    counts: Counter[int] = Counter()
    for epoch in range(2):
        samples = epoch_samples(p, epoch)
        assert len(samples) == 1003
        assert sum(i < 100 for i in samples) in (501, 502)
        counts.update(samples)
    small = [counts[i] for i in range(100)]
    assert max(small) - min(small) <= 1
    assert max(counts[i] for i in range(100, 1003)) <= 2
    only = plan(1, 1, 1, dataset_sizes=[100, 903], ratios=[0, 1])
    assert min(epoch_samples(only, 0)) >= 100


def test_less_than_a_global_batch_is_told() -> None:
    with pytest.raises(DataError, match=r"less than one global batch of 2000 .*Lower"):
        plan(100, 20, 1)
    with pytest.raises(DataError, match="ratios"):
        plan(ratios=[0.0])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_budget_of_tokens_deals_the_rows_of_a_step_into_few_even_micro_batches(world_size: int) -> None:
    plain = plan(batch_size=1, accum=24 // world_size, world_size=world_size)
    budget = plan(batch_size=1, accum=24 // world_size, world_size=world_size, tokens=400)
    for step in range(budget.steps_per_epoch):
        parts = [budget.micro_batches(0, step, rank) for rank in range(world_size)]
        assert len({len(own) for own in parts}) == 1  # ranks wait for each other no longer than they have to
        for rank, own in enumerate(parts):
            sums = [sum(LENGTHS[i] for row in part for i in row) for part in own]
            assert max(sums) <= 400 and len(own) <= -(-sum(sums) // 300)
            rows = sorted(i for part in own for row in part for i in row)
            assert rows == sorted(i for part in plain.micro_batches(0, step, rank) for row in part for i in row)
