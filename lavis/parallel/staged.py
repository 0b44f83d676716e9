"""A model of which each rank of a pipeline has one stage: validated and asked by all of them together. Training goes
through DeepSpeed's engine: lavis.parallel.pipeline.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lavis.core.output import LossOutput
from lavis.core.types import Batch
from lavis.generation.cache import left_padded
from lavis.generation.decoding import Decoder, KeyValueDecoder
from lavis.models.stages import Stage
from lavis.objectives.base import Objective
from lavis.objectives.learner import Learner
from lavis.parallel.strategy import Ranks

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Autocast = Callable[[], contextlib.AbstractContextManager[object]]


class Pipe:
    """The way from this rank's stage to the others."""

    def __init__(self, stage: Stage, ranks: Ranks) -> None:
        self.stage, self._ranks, self._group = stage, ranks.pipe, ranks.pipe_group
        self.device = ranks.world.device

    def through(self, embed: Callable[[], torch.Tensor], **settings: Any) -> torch.Tensor | None:
        """What `embed` gives on the first stage through all of them: hidden states on the last one, None elsewhere."""
        part = self.stage.part
        embeds = embed() if part.is_first else self._receive(self._ranks[part.index - 1])
        hidden = self.stage.hidden(embeds, **settings)
        if part.is_last:
            return hidden
        self._send(hidden, self._ranks[part.index + 1])
        return None

    def from_last(self, tensor: torch.Tensor) -> torch.Tensor:
        """The last stage's `tensor` on all of them; the others give one of its shape and type."""
        dist.broadcast(tensor, self._ranks[-1], group=self._group)
        return tensor

    def _send(self, tensor: torch.Tensor, rank: int) -> None:
        meta = torch.tensor([*tensor.shape, _DTYPES.index(tensor.dtype)], device=self.device)
        dist.send(meta, rank, group=self._group)
        dist.send(tensor.contiguous(), rank, group=self._group)

    def _receive(self, rank: int) -> torch.Tensor:
        meta = torch.empty(4, dtype=torch.long, device=self.device)
        dist.recv(meta, rank, group=self._group)
        *shape, dtype = meta.tolist()
        tensor = torch.empty(shape, dtype=_DTYPES[dtype], device=self.device)
        dist.recv(tensor, rank, group=self._group)
        return tensor


class StagedLearner(Learner):
    """A learner whose `model` is this rank's stage. The ranks of a pipeline call it together, with the same batches."""

    model: Stage

    def __init__(
        self, stage: Stage, objective: Objective, ranks: Ranks, autocast: Autocast = contextlib.nullcontext
    ) -> None:
        super().__init__(stage, objective, ranks.data)
        self.pipe, self._autocast = Pipe(stage, ranks), autocast

    def forward(self, batch: Batch) -> LossOutput:
        """See Learner; the same on all ranks of the pipeline, without a graph."""
        names = ("loss", *self.objective.parts)
        values = torch.zeros(len(names), device=self.world.device)
        with torch.no_grad(), self._autocast():
            hidden = self.pipe.through(
                lambda: self.model.front.embed(batch), position_ids=batch.position_ids, use_cache=False
            )
            if hidden is not None:
                out = self.objective.loss(self.scorer(), hidden, batch)
                values = torch.stack([out.loss_sum, *(out.parts[name] for name in names[1:])]).float()
        sums = dict(zip(names, self.pipe.from_last(values), strict=True))
        return LossOutput(sums.pop("loss"), self.objective.units(batch), sums)

    def decoder(self) -> Decoder:
        return StagedDecoder(self.pipe, self._autocast)

    def image_encoder(self) -> Any:
        """See Learner. On the first stage."""
        return self.model.front

    def tensors(self) -> Mapping[str, nn.Parameter]:
        return dict(self.model.whole_names())


class StagedDecoder(KeyValueDecoder):
    """Each stage keeps the keys and values of its own blocks; the last one chooses."""

    def __init__(self, pipe: Pipe, autocast: Autocast) -> None:
        super().__init__(pipe.stage.llm)
        self.pipe, self._autocast = pipe, autocast

    @property
    def _device(self) -> torch.device:
        return self.pipe.device

    def read(self, batch: Batch) -> torch.Tensor | None:
        embeds = None
        if self.pipe.stage.part.is_first:
            with self._autocast():
                embeds = left_padded(self.pipe.stage.front.embed(batch), batch.lengths)
        return self.add(embeds, max(batch.lengths), batch.lengths)

    def _forward(self, inputs: torch.Tensor | None, **settings: Any) -> torch.Tensor | None:
        stage = self.pipe.stage

        def embed() -> torch.Tensor:
            assert inputs is not None
            return inputs if inputs.is_floating_point() else stage.front.embed_parts(inputs, None)

        with self._autocast():
            hidden = self.pipe.through(embed, use_cache=True, **settings)
            return None if hidden is None else stage.scorer().logits(hidden[:, -1])

    def agreed(self, tokens: list[int] | None, rows: int) -> list[int]:
        """See Decoder: what the last stage chose."""
        chosen = torch.tensor(tokens if tokens is not None else [0] * rows, device=self._device)
        return self.pipe.from_last(chosen).tolist()
