"""Attention within samples: rows that hold several cost what the samples cost, and padding costs nothing.

Registered with transformers as an attention of its own, so that it is the same in a whole model, under adapters, in a
pipeline's stage, when activations are recomputed and when a plan is traced. Where no samples are given, as in
decoding, it is transformers' sdpa.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lavis.models.lean import lean

NAME = "within_samples"
_LENGTH_DEPENDENT_ROPE = r"'(rope_)?type': '(longrope|\w*dynamic\w*)'"
_GROUPED = "enable_gqa" in inspect.signature(varlen_attn).parameters  # since torch 2.12

Runs = tuple[tuple[int, ...], ...]
"""For each row of a batch, the lengths of the pieces that do not see each other, without padding."""


@dataclass(frozen=True)
class Samples:
    """Lengths of the samples of a row [1, T], which stands where transformers has an attention mask. Empty: rows of one
    sample each, padded on the right or not at all.

    prefix: for each layer, keys and values [1, H, P, D] of tokens that stand before every sample.
    """

    lengths: tuple[int, ...]
    prefix: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    def borders(self, device: torch.device, more: int = 0) -> torch.Tensor:
        """Where samples of `more` further tokens each begin, and where the last one ends, int32."""
        return _borders(tuple(n + more for n in self.lengths), device)


_given: ContextVar[Samples | None] = ContextVar("samples", default=None)


@contextlib.contextmanager
def attending(samples: Samples) -> Iterator[None]:
    """Inside it, models that were prepared see `samples` in place of the mask that transformers would make."""
    token = _given.set(samples)
    try:
        yield
    finally:
        _given.reset(token)


def attends_only(llm: PreTrainedModel) -> bool:
    """Whether the LLM remembers nothing but keys and values that depend on what came before alone.

    Recurrent ones remember more; rotary embeddings that change with the length of the longest row depend on more.
    """
    if "past_key_values" not in inspect.signature(llm.forward).parameters or re.search(
        _LENGTH_DEPENDENT_ROPE, str(llm.config.to_dict())
    ):
        return False
    try:
        layers = DynamicCache(config=llm.config).layers
    except (KeyError, AttributeError, ValueError):
        return False
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def prepare(llm: PreTrainedModel) -> None:
    """Let `llm` attend within samples, if it can: if its attention is one that others may take the place of."""
    lean(llm)
    if llm.config._attn_implementation == "sdpa" and llm._supports_attention_backend and attends_only(llm):
        llm.set_attn_implementation(NAME)


def prepared(llm: PreTrainedModel) -> bool:
    return llm.config._attn_implementation == NAME


def runs_of(position_ids: torch.Tensor) -> Runs:
    """The runs of rows whose positions begin again at 0 with each; padding that goes on counting is in the last."""
    return tuple(tuple(_gaps([*_zeros(row), len(row)])) for row in position_ids.tolist())


def are_packed(runs: Runs) -> bool:
    """Whether any row holds several samples."""
    return any(len(row) > 1 for row in runs)


def places(runs: Runs, width: int, device: torch.device, skipped: int = 0) -> torch.Tensor | None:
    """Where in rows of `width` positions, laid end to end, samples are, int64 [T], without the first `skipped` of each;
    None: everywhere.
    """
    if not skipped and all(sum(row) == width for row in runs):
        return None
    pieces = [torch.arange(start + skipped, start + length) for start, length in _starts(runs, width)]
    return torch.cat(pieces).to(device, non_blocking=True)


def first_places(runs: Runs, width: int, device: torch.device, count: int) -> torch.Tensor:
    """Where, likewise, the first `count` tokens of each sample are, int64 [N count]."""
    pieces = [torch.arange(start, start + count) for start, _ in _starts(runs, width)]
    return torch.cat(pieces).to(device, non_blocking=True)


def _starts(runs: Runs, width: int) -> Iterator[tuple[int, int]]:
    for i, row in enumerate(runs):
        yield from zip(itertools.accumulate(row, initial=i * width), row, strict=False)


def flat(rows: torch.Tensor, where: torch.Tensor | None) -> torch.Tensor:
    """Rows [B, L, ...] as one [1, T, ...], those positions alone that `places` gave."""
    joined = rows.flatten(0, 1)
    return (joined if where is None else joined.index_select(0, where)).unsqueeze(0)


def in_rows(joined: torch.Tensor, where: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor:
    """Undo `flat` into rows of `shape` [B, L]; positions that were left out are zeros."""
    if where is not None:
        joined = joined.new_zeros(1, shape[0] * shape[1], *joined.shape[2:]).index_copy(1, where, joined)
    return joined.view(*shape, *joined.shape[2:])


def _zeros(row: list[int]) -> list[int]:
    return [i for i, position in enumerate(row) if position == 0]


def _gaps(borders: Sequence[int]) -> list[int]:
    return [b - a for a, b in itertools.pairwise(borders)]


def _mask(*args: Any, **kwargs: Any) -> Any:
    return _given.get() or sdpa_mask(*args, **kwargs)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """As every attention of transformers: [1, H, T, D] and keys and values of H or fewer heads -> [1, T, H, D]."""
    if not isinstance(attention_mask, Samples):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if not attention_mask.lengths:
        return _one(module, query, key, value, None, **settings), None
    prefix = attention_mask.prefix[cast(int, module.layer_idx)] if attention_mask.prefix else None
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not settings.get("dropout"):
        return _by_kernel(query, key, value, attention_mask, prefix, **settings), None
    pieces = (x.split(attention_mask.lengths, dim=2) for x in (query, key, value))
    outs = [_one(module, q, k, v, prefix, **settings) for q, k, v in zip(*pieces, strict=True)]
    return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)), None


def _one(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor] | None,
    **settings: Any,
) -> torch.Tensor:
    """A sample by itself."""
    if prefix is not None:
        key, value = (torch.cat((before, own), dim=2) for before, own in zip(prefix, (key, value), strict=True))
    length, total, window = query.shape[2], key.shape[2], settings.get("sliding_window")
    mask = None
    if total > length or (window and total > window):
        mask = _band(length, total, window or total, query.device)
    return sdpa_attention_forward(module, query, key, value, mask, **settings)[0]


def _by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    samples: Samples,
    prefix: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> torch.Tensor:
    """All samples in one call of the kernel for rows of any length."""
    before = 0
    if prefix is not None:
        before = prefix[0].shape[2]
        key, value = (_interleaved(p, x, samples.lengths) for p, x in zip(prefix, (key, value), strict=True))
    groups = query.shape[1] // key.shape[1]
    if not _GROUPED:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    longest = max(samples.lengths)
    borders = samples.borders(query.device)
    # the same tensor twice says that queries and keys are of one length, which more kernels can do
    others = samples.borders(query.device, before) if before else borders
    window = (sliding_window - 1 if sliding_window else -1, 0)
    more: dict[str, Any] = {"enable_gqa": groups > 1} if _GROUPED else {}
    out = varlen_attn(q, k, v, borders, others, longest, longest + before, scale=scaling, window_size=window, **more)
    return cast(torch.Tensor, out).unsqueeze(0)


def _interleaved(prefix: torch.Tensor, own: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """The prefix before each sample's keys or values, [1, H, T + N P, D]."""
    return torch.cat([part for piece in own.split(tuple(lengths), dim=2) for part in (prefix, piece)], dim=2)


@functools.lru_cache(maxsize=64)  # the layers of a step ask for the same
def _borders(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # validation may ask first, and training cannot save its tensors
        borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return borders.to(device, non_blocking=True)  # made there, it would be waited for


def _band(length: int, total: int, window: int, device: torch.device) -> torch.Tensor:
    """Which of `total` positions the last `length` of them look at: themselves and up to `window - 1` before."""
    query = torch.arange(total - length, total, device=device)[:, None]
    key = torch.arange(total, device=device)[None]
    return ((key <= query) & (key > query - window))[None, None]


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)
