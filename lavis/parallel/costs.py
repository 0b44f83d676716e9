"""What operations cost in arithmetic and memory, counted as they run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Spent(NamedTuple):
    """What a step takes that keeps nothing for backward: FLOPs, the most bytes alive beside those that were before, and
    the form of what comes out of it.
    """

    flops: int
    peak: int
    storage: int
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype


class CostMode(TorchDispatchMode):
    """Counts FLOPs, and the bytes of tensors made inside it that are alive: `now`, and at most since the last `lap`.

    `known` tensors are not counted.
    """

    # torch's FlopCounterMode would do for the first half, but its module tracker keeps tensors alive.

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self._most = self.flops = 0
        self._storages = {t.untyped_storage()._cdata for t in known}

    def lap(self) -> int:
        """The most since the last call."""
        most, self._most = self._most, self.now
        return most

    def spent(self, step: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Spent]:
        """What `step` gives, and what that takes."""
        most, flops, before = self._most, self.flops, self.now
        self._most = before
        out = step()
        peak, self._most = self._most - before, max(self._most, most)
        room = out.untyped_storage().nbytes() // out.itemsize
        form = (room, out.shape, out.stride(), int(out.storage_offset()), out.dtype)
        return out, Spent(self.flops - flops, peak, *form)

    def spend(self, known: Spent) -> torch.Tensor:
        """Count what a step took once, without doing it; a tensor as it gave."""
        self.flops += known.flops
        self._most = max(self._most, self.now + known.peak)
        room = torch.empty(known.storage, dtype=known.dtype)
        return room.as_strided(known.shape, known.strides, known.offset)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
        if formula:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.now += size
        self._most = max(self._most, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.now -= size
