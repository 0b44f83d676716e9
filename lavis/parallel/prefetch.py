"""Batches on their way to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from lavis.core.types import Batch


def prefetched(batches: Iterable[Batch], ready: Callable[[Batch], Batch], device: torch.device) -> Iterator[Batch]:
    """`ready` of each batch. On a GPU the next one is copied, by a queue of its own, while the present one is worked
    on; more than these two are never there.
    """
    if device.type != "cuda":
        yield from map(ready, batches)
        return
    copies, work = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        present = ahead
        with torch.cuda.stream(copies):
            ahead = ready(batch), copies.record_event()
        if present:
            yield _taken(*present, work)
    if ahead:
        yield _taken(*ahead, work)


def _taken(batch: Batch, there: torch.cuda.Event, work: torch.cuda.Stream) -> Batch:
    """`batch` for use in `work`, once it is there; its memory is free when that use is over."""
    work.wait_event(there)
    for tensor in batch.tensors().values():
        tensor.record_stream(work)
    return batch
