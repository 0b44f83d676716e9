"""The share of the hardware's arithmetic that training reaches: what the model asks for, over what there was time for.

Counted by formula, as is usual: a matrix of N weights costs a vector 2N in the forward pass, 2N for the gradient of its
input and, if it is trained, 2N for its own. Attention costs what a causal one does. What is computed a second time is
not asked for by the model, and is told apart.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lavis.core.types import Batch
from lavis.parallel.plan import GPUS, matmul_rate
from lavis.parallel.strategy import Ranks

UNITS = ("tokens", "pairs", "supervised", "tiles")
"""What is paid for: tokens in blocks, pairs of them in a sample (n * n), tokens under the head, tiles in the tower."""
Costs = dict[str, float]
"""Unit to FLOPs, forward and backward."""


@dataclass(frozen=True)
class Arithmetic:
    """What a training step of `model` costs all ranks, and how fast they could be at best, FLOP/s (None: not known).

    asked: by the model; again: for the activations that are recomputed.
    """

    model: Any
    asked: Costs
    again: Costs
    peak: float | None

    @classmethod
    def of(cls, model: Any, ranks: Ranks) -> Arithmetic:
        """Of the parts that the ranks have; before weights are split over them. Called by all."""
        own = [costs[unit] for costs in _costs(model) for unit in UNITS]
        whole = [total / ranks.data.size for total in ranks.world.sum(*own)]  # stages are summed, replicas are not
        asked, again = (dict(zip(UNITS, part, strict=True)) for part in (whole[: len(UNITS)], whole[len(UNITS) :]))
        return cls(model, asked, again, _peak(ranks.world.device, ranks.world.size) if ranks.world.is_main else None)

    def units(self, batch: Batch) -> Costs:
        """How much of each unit is in a batch; what samples have in common is read once and costs nothing."""
        shared = len(batch.known.beginning) if getattr(self.model, "shares_beginnings", False) else 0
        pieces = [n for row in batch.known.runs or ((n,) for n in batch.lengths) for n in row]
        return {
            "tokens": sum(pieces) - shared * len(pieces),
            "pairs": sum(n * n - shared * shared for n in pieces),
            "supervised": batch.supervised_tokens,
            "tiles": 0 if batch.pixel_values is None else len(batch.pixel_values),
        }

    def shares(self, units: Mapping[str, float], seconds: float) -> dict[str, float]:
        """`mfu` and, if anything is recomputed, `mfu_recomputed` of steps of so many units; empty if not known."""
        found = {"mfu": self.asked, "mfu_recomputed": self.again}
        flops = {name: sum(costs[unit] * units[unit] for unit in UNITS) for name, costs in found.items()}
        return {name: value / seconds / self.peak for name, value in flops.items() if value and self.peak}


def _costs(model: Any) -> tuple[Costs, Costs]:
    """(asked, again) of a Vlm or a stage of one; nothing of models without an LLM, or with experts, of which a token
    sees some alone.
    """
    asked, again = dict.fromkeys(UNITS, 0.0), dict.fromkeys(UNITS, 0.0)
    llm: Any = getattr(model, "llm", None) or getattr(model, "llm_model", None)
    if llm is None or getattr(llm.config.get_text_config(), "num_experts_per_tok", None):
        return asked, again
    config = llm.config.get_text_config()
    head = llm.get_output_embeddings()
    heads = getattr(config, "num_attention_heads", 0)
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1))
    once = 2 * width * config.num_hidden_layers  # half of the pairs, by two products
    weights = list(_matrices(llm, head))
    asked["tokens"] = sum((6 if p.requires_grad else 4) * n for p, n in weights)
    asked["pairs"] = 3 * once
    asked["supervised"] = sum((6 if p.requires_grad else 4) * n for p, n in _matrices(head)) if head else 0.0
    asked["tiles"] = _tile(getattr(model, "front", model))
    if model.config.llm.recomputes:
        again["tokens"], again["pairs"] = 2.0 * sum(n for _, n in weights), once
    return asked, again


def _tile(front: Any) -> float:
    """Of tower and connector; the latter's matrices see the tower's vectors or, if they are of another width, its
    own.
    """
    tower, connector = getattr(front, "visual_encoder", None), getattr(front, "connector", None)
    if tower is None or connector is None:
        return 0.0
    c, total, learned = front.config, 0.0, False
    span, width = c.tower.span(), c.tower.width()
    for part in (tower, connector):
        learned = learned or part.trained
        frozen = 4 if learned else 2
        for p, n in _matrices(part):
            seen = span if part is tower or p.shape[-1] == width else c.tokens_per_tile
            total += (6 if p.requires_grad else frozen) * n * seen
        if part is tower:
            total += (3 if learned else 1) * 4 * span**2 * width * (c.tower.blocks() or 0)
    return total


def _matrices(module: nn.Module, without: nn.Module | None = None) -> Iterator[tuple[nn.Parameter, int]]:
    """Weights that vectors are multiplied by, and how many numbers each is (quantised ones are packed)."""
    part: Any
    for part in module.modules():
        if part is without or isinstance(part, nn.Embedding):
            continue
        for p in part.parameters(recurse=False):
            if p.ndim in (2, 4):
                linear = hasattr(part, "in_features") and hasattr(part, "out_features")
                yield p, part.in_features * part.out_features if linear else p.numel()


def _peak(device: torch.device, ranks: int) -> float | None:
    """FLOP/s of all ranks: published dense bf16 of a GPU in the plans' table, measured of a CPU, which they share."""
    if device.type != "cuda":
        return matmul_rate() * min(ranks, max(1, (os.cpu_count() or 1) // torch.get_num_threads()))
    name = torch.cuda.get_device_name(device).lower()
    known = (teraflops * 1e12 * ranks for key, (_, teraflops) in GPUS.items() if key.split("-")[0] in name)
    return next(known, None)
