"""Batches reach a GPU one ahead of the work on them. There is none here: its queues note what they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from lavis.core.types import Batch
from lavis.parallel.prefetch import prefetched

IDS = torch.zeros(1, 2, dtype=torch.long)
BATCHES = [Batch(IDS, IDS, IDS, num_samples=i) for i in range(3)]


def test_on_a_cpu_batches_are_made_ready_one_by_one() -> None:
    made: list[int] = []

    def ready(batch: Batch) -> Batch:
        made.append(batch.num_samples)
        return batch

    for i, batch in enumerate(prefetched(BATCHES, ready, torch.device("cpu"))):
        assert batch is BATCHES[i] and len(made) == i + 1


class Queue:
    """A stream."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes, self.copied = name, notes, 0

    def record_event(self) -> int:
        return self.copied

    def wait_event(self, event: int) -> None:
        self.notes.append(f"wait {event}")


def test_on_a_gpu_the_next_batch_is_copied_before_the_present_one_is_worked_on(monkeypatch: Any) -> None:
    notes: list[str] = []
    copies, work = Queue("copies", notes), Queue("work", notes)
    now = [work]

    @contextmanager
    def inside(stream: Queue) -> Iterator[None]:
        now.append(stream)
        yield
        now.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copies)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: work)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: notes.append(stream.name))

    def ready(batch: Batch) -> Batch:
        assert now[-1] is copies
        copies.copied += 1
        notes.append(f"copy {copies.copied}")
        return batch

    def use(batch: Batch) -> None:
        notes.append(f"use {batch.num_samples + 1}")

    for batch in prefetched(BATCHES, ready, torch.device("cuda")):
        use(batch)
    used = ["work"] * 3  # the memory of three tensors is not given away while they are worked on
    assert notes == [
        *("copy 1", "copy 2", "wait 1", *used, "use 1"),
        *("copy 3", "wait 2", *used, "use 2"),
        *("wait 3", *used, "use 3"),
    ]


def test_all_tensors_of_a_batch_are_pinned_and_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    batch = Batch(IDS, IDS, IDS, features=torch.zeros(1, 2, 3), lengths=(2,)).told(predicting=torch.zeros(1))
    pinned = batch.pin_memory()
    assert batch.tensors().keys() == pinned.tensors().keys() and len(batch.tensors()) == 5
    assert all(torch.equal(tensor, batch.tensors()[name] + 1) for name, tensor in pinned.tensors().items())
    assert pinned.lengths == (2,)
