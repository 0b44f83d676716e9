"""Keys and values of attention: a cache whose growth copies nothing old, and a store of those of conversations that may
go on.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Cache
from transformers.cache_utils import DynamicLayer

Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [rows, heads, tokens, width] of each layer."""


class GrowingLayer(DynamicLayer):
    """A DynamicLayer with room to spare: a new token is written behind the others in place of copying them all."""

    def __init__(self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None) -> None:
        super().__init__()
        self.room: tuple[torch.Tensor, torch.Tensor] | None = None
        if keys is not None and values is not None:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if self.room is None or new > self.room[0].shape[-2]:
            size = max(new + 64, new * 5 // 4)  # each token is copied a few times in all, whatever the length
            self.room = (
                _with_room(self.keys, key_states, old, size),
                _with_room(self.values, value_states, old, size),
            )
        keys, values = self.room
        keys[..., old:new, :], values[..., old:new, :] = key_states, value_states
        self.keys, self.values = keys[..., :new, :], values[..., :new, :]
        return self.keys, self.values


def _with_room(have: torch.Tensor | None, like: torch.Tensor, old: int, size: int) -> torch.Tensor:
    room = like.new_empty(*like.shape[:-2], size, like.shape[-1])
    if have is not None and old:
        room[..., :old, :] = have
    return room


def new_cache(layers: Layers | None = None) -> Cache:
    """A cache that holds `layers`, or nothing yet. What it is given is never written to."""
    if layers is None:
        return Cache(layer_class_to_replicate=GrowingLayer)
    return Cache(layers=[GrowingLayer(keys, values) for keys, values in layers])


def layers_of(cache: Cache) -> Layers:
    """Views of what `cache` holds."""
    layers: list[Any] = cache.layers  # of attention, and with something in them
    return [(layer.keys, layer.values) for layer in layers]


def joined(parts: Sequence[Layers]) -> Layers:
    """Rows of several lengths as one batch, the shorter ones padded on the left."""
    longest = max(part[0][0].shape[-2] for part in parts)

    def padded(t: torch.Tensor) -> torch.Tensor:
        return F.pad(t, (0, 0, longest - t.shape[-2], 0))

    def batch(i: int, j: int) -> torch.Tensor:
        return torch.cat([padded(part[i][j]) for part in parts])

    return [(batch(i, 0), batch(i, 1)) for i in range(len(parts[0]))]


def left_padded(embeds: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Right-padded rows [B, L, D] padded on the left with zeros."""
    longest = max(lengths)
    rows = [row[:n] for row, n in zip(embeds, lengths, strict=True)]
    return torch.stack([F.pad(row, (0, 0, longest - len(row), 0)) for row in rows])


def row_of(layers: Layers, row: int, length: int) -> Layers:
    """The last `length` tokens of one row, as a copy when there are other rows."""
    copy = layers[0][0].shape[0] > 1

    def cut(t: torch.Tensor) -> torch.Tensor:
        part = t[row : row + 1, :, t.shape[-2] - length :]
        return part.clone() if copy else part

    return [(cut(keys), cut(values)) for keys, values in layers]


class PrefixStore:
    """Keys and values of finished rows, by what was read there; the least recently used go when they are more than
    `max_bytes` or `max_rows`.
    """

    def __init__(self, max_bytes: int, max_rows: int = 128) -> None:
        self.max_bytes, self.max_rows = max_bytes, max_rows
        self._rows: dict[tuple[Hashable, ...], Layers] = {}

    def longest(self, keys: Sequence[Hashable]) -> tuple[int, Layers | None]:
        """How many of the first of `keys` a stored row begins with, all but the last of them at most, and that much of
        it.
        """
        best, found = 0, None
        for stored in self._rows:
            if stored[best : best + 1] != tuple(keys[best : best + 1]):  # can't be longer
                continue
            n = _common(stored, keys)
            if n > best:
                best, found = n, stored
        best = min(best, len(keys) - 1)
        if not best or found is None:
            return 0, None
        layers = self._rows[found] = self._rows.pop(found)  # the most recently used is the last
        return best, [(k[..., :best, :], v[..., :best, :]) for k, v in layers]

    def put(self, keys: Sequence[Hashable], layers: Layers) -> None:
        """Keep a row; what it goes on from is dropped."""
        keys = tuple(keys)
        for stored in [s for s in self._rows if len(s) <= len(keys) and s == keys[: len(s)]]:
            del self._rows[stored]
        self._rows[keys] = layers
        while len(self._rows) > self.max_rows or (self._rows and self.num_bytes > self.max_bytes):
            del self._rows[next(iter(self._rows))]

    def clear(self) -> None:
        self._rows.clear()

    @property
    def num_bytes(self) -> int:
        """Memory of all rows."""
        return sum(
            t.untyped_storage().nbytes() for layers in list(self._rows.values()) for pair in layers for t in pair
        )

    def __len__(self) -> int:
        return len(self._rows)


def _common(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """How many first items are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
