"""An optimiser step by DeepSpeed's pipeline engine: one layer of it is one of our stages."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn
from transformers import DynamicCache

from lavis.config.schema import RunConfig
from lavis.core.dist import World
from lavis.core.errors import DataError
from lavis.core.output import LossOutput
from lavis.core.types import Batch
from lavis.models.stages import Stage
from lavis.objectives.base import Task
from lavis.parallel.strategy import StepResult, Strategy
from lavis.parallel.zero import engine_config
from lavis.train.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors, set_learning_rate

Tensors = dict[str, torch.Tensor]


class StagedModel(nn.Module):
    """What the loop, the evaluator and the answerer call a model: this rank's stage and the way to the others.

    All ranks of one pipeline call it together, with the same batches.
    """

    def __init__(self, stage: Stage, group: dist.ProcessGroup, ranks: Sequence[int], device: torch.device) -> None:
        super().__init__()
        self.stage, self._group, self._ranks, self._device = stage, group, ranks, device
        self.autocast: Callable[[], Any] = torch.no_grad

    def named_parameters(self, *args: Any, **kwargs: Any):
        """Under the names of the whole model."""
        return self.stage.whole_names()

    def forward(self, batch: Batch) -> LossOutput:
        """Loss of a batch, the same on all ranks of the pipeline; no graph. Training goes through the engine."""
        with torch.no_grad(), self.autocast():
            hidden = self._through(batch, position_ids=batch.position_ids, use_cache=False)
            part = self.stage.part
            loss = self.stage.loss(hidden, batch.labels) if part.is_last else torch.zeros((), device=self._device)
        dist.broadcast(loss, self._ranks[-1], group=self._group)
        return LossOutput(loss, batch.supervised_tokens)

    def _through(self, batch: Batch | torch.Tensor, **settings: Any) -> torch.Tensor:
        """A batch (or ids, later in a generation) through all stages; the last stage's hidden states, there alone."""
        part = self.stage.part
        if part.is_first:
            front = self.stage.front
            embeds = front.embed(batch) if isinstance(batch, Batch) else front.embed_parts(batch, None)
        else:
            embeds = self._receive(self._ranks[part.index - 1])
        hidden = self.stage.hidden(embeds, **settings)
        if not part.is_last:
            self._send(hidden, self._ranks[part.index + 1])
        return hidden

    def _send(self, tensor: torch.Tensor, rank: int) -> None:
        dist.send(
            torch.tensor([*tensor.shape, _DTYPES.index(tensor.dtype)], device=self._device), rank, group=self._group
        )
        dist.send(tensor.contiguous(), rank, group=self._group)

    def _receive(self, rank: int) -> torch.Tensor:
        meta = torch.empty(4, dtype=torch.long, device=self._device)
        dist.recv(meta, rank, group=self._group)
        *shape, dtype = meta.tolist()
        tensor = torch.empty(shape, dtype=_DTYPES[dtype], device=self._device)
        dist.recv(tensor, rank, group=self._group)
        return tensor

    @torch.inference_mode()
    def generate(
        self,
        batch: Batch,
        stop_token_ids: Sequence[int],
        pad_token_id: int,
        *,
        max_new_tokens: int = 512,
        do_sample: bool = False,
    ) -> list[list[int]]:
        """Greedy continuations, as lavis.models.llm.generate; each stage keeps keys and values of its own blocks."""
        assert not do_sample
        part, lengths = self.stage.part, torch.tensor(batch.lengths, device=self._device)
        width = int(lengths.max())
        room = getattr(self.stage.llm.config, "max_position_embeddings", width + max_new_tokens) - width
        if room < 1:
            raise DataError(f"a prompt of {width} tokens leaves no room for an answer. Shorten the conversation.")
        ids = _left(batch.input_ids, lengths, width, pad_token_id)
        mask = (torch.arange(width, device=self._device) >= (width - lengths)[:, None]).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache, rows, done = (
            DynamicCache(config=self.stage.llm.config),
            [],
            torch.zeros(len(ids), dtype=torch.bool, device=self._device),
        )
        step: Batch | torch.Tensor = _with_ids(batch, ids)
        stops = torch.tensor(list(stop_token_ids), device=self._device)
        for _ in range(min(max_new_tokens, room)):
            with self.autocast():
                hidden = self._through(
                    step, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
                )
                if part.is_last:
                    chosen = self.stage.llm.get_output_embeddings()(hidden[:, -1]).argmax(-1)
                else:
                    chosen = torch.empty(len(ids), dtype=torch.long, device=self._device)
            dist.broadcast(chosen, self._ranks[-1], group=self._group)
            chosen = chosen.masked_fill(done, pad_token_id)
            rows.append(chosen)
            done |= torch.isin(chosen, stops)
            if done.all():
                break
            step, mask, positions = chosen[:, None], F.pad(mask, (0, 1), value=1), positions[:, -1:] + 1
        return [list(takewhile(lambda t: t not in stop_token_ids, row)) for row in torch.stack(rows, 1).tolist()]


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _left(ids: torch.Tensor, lengths: torch.Tensor, width: int, pad: int) -> torch.Tensor:
    """Right-padded rows [B, L] padded on the left."""
    rows = [F.pad(row[:n], (width - n, 0), value=pad) for row, n in zip(ids, lengths.tolist(), strict=True)]
    return torch.stack(rows)


def _with_ids(batch: Batch, ids: torch.Tensor) -> Batch:
    return replace(batch, input_ids=ids)


class PipelineStrategy(Strategy):
    """Stages side by side, micro-batches one behind the other; data-parallel where there are more ranks than stages.

    Loss, gradient and checkpoints are those of DataParallelStrategy.
    """

    model: StagedModel

    def __init__(
        self, model: StagedModel, task: Task, run: RunConfig, world: World, replicas: World, accumulation: int
    ) -> None:
        super().__init__(model, task, run, world)
        self.replicas, self.accumulation = replicas, accumulation
        stage = model.stage
        self.total, self.loss_sum, self.number = 1.0, 0.0, 0
        self.result = StepResult(math.nan, math.nan, 0.0)
        self.optimizer = build_optimizer(stage, run)
        model.autocast = self.autocast
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # joins the group that is there
        staged = PipelineModule(
            layers=[LayerSpec(_Forward, stage, self.autocast) for _ in range(stage.part.count)],
            num_stages=stage.part.count,
            loss_fn=self._loss,
            partition_method="uniform",
            activation_checkpoint_interval=0,
            seed_layers=False,
            dynamic_shape=True,
        )
        config = engine_config(run, None, accumulation)
        # the norm is that of all stages: see _before_update
        config |= {"gradient_clipping": 0.0, "zero_optimization": {"stage": 0}}
        self.engine, *_ = deepspeed.initialize(
            model=staged, optimizer=self.optimizer, config=config, dist_init_required=False
        )
        self.optimizer.register_step_pre_hook(self._before_update)

    def _loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            loss = self.model.stage.loss(hidden, labels)
        self.loss_sum += loss.item()
        # DeepSpeed takes the mean over micro-batches and replicas
        return loss / self.total * self.accumulation * self.replicas.size

    def step(self, batches: list[Batch], rate: float, number: int) -> StepResult:
        """See Strategy. The error comes before anything is saved."""
        (self.total,) = self.replicas.sum(sum(self.task.count(b) for b in batches))
        self.loss_sum = 0.0
        set_learning_rate(self.optimizer, rate)
        self.number = number
        self.engine.train_batch(map(self._micro_batch, batches))
        return self.result

    def _before_update(self, *_: object) -> None:
        """The optimiser's hook: all gradients are summed, nothing is updated yet."""
        started = time.perf_counter()
        own = [p.grad for _, p in self._trained() if p.grad is not None]
        square = torch.nn.utils.get_total_norm(own).item() ** 2 if own else 0.0
        loss, square = self.world.sum(self.loss_sum / self.total, square)
        norm = math.sqrt(square / self.replicas.size) if square >= 0 else math.nan
        self.check_finite(self.number, loss, norm)
        if self.run.grad_norm_clip is not None and own:
            torch.nn.utils.clip_grads_with_norm_(
                [p for _, p in self._trained()], self.run.grad_norm_clip, torch.tensor(norm, device=own[0].device)
            )
        self.result = StepResult(loss, norm, time.perf_counter() - started)

    def _micro_batch(self, batch: Batch) -> tuple[Any, ...]:
        """(what the first stage takes, what the last stage takes)."""
        config = self.model.stage.config
        images = batch.pixel_values if batch.features is None else batch.features
        if images is None and self.model.stage.part.is_first:
            if self.model.stage.front.tower_frozen:
                images = torch.empty(0, config.num_query_token, config.qformer.hidden_size)
            else:
                images = torch.zeros(1, 3, config.image_size, config.image_size)
        return (batch.input_ids, batch.position_ids, images), batch.labels

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.stage.whole_names() if p.requires_grad]

    def trained_tensors(self) -> Tensors:
        """See Strategy; collected from the stages."""
        return self._collected({name: p.detach().cpu() for name, p in self._trained()})

    def state_tensors(self) -> Tensors:
        """See Strategy; collected from the stages."""
        part = self.model.stage.part
        state = optimizer_tensors(self.optimizer, self.model.stage)
        return self._collected(
            {_renamed(key, part.whole_name): value.cpu() for key, value in state.items() if not key.endswith(".anchor")}
        )

    def _collected(self, own: Tensors) -> Tensors:
        """The tensors of all stages, from the first replica of each, on rank 0."""
        sent = own if self.replicas.rank == 0 else {}
        found: list[Tensors | None] = [None] * self.world.size if self.world.is_main else []
        if self.world.size == 1:
            return sent
        dist.gather_object(sent, found if self.world.is_main else None)
        return {name: tensor for part in found if part for name, tensor in part.items()}

    def load_state_tensors(self, tensors: Tensors) -> None:
        """See Strategy; each stage takes what is its own."""
        stage = self.model.stage
        own = {
            stage.part.whole_name(name.removeprefix("front.")): name
            for name, p in stage.named_parameters()
            if p.requires_grad
        }
        load_optimizer_tensors(
            self.optimizer,
            stage,
            {
                f"{slot}.{own[name]}": value
                for key, value in tensors.items()
                for slot, _, name in [key.partition(".")]
                if name in own
            },
        )


def _renamed(key: str, whole_name: Callable[[str], str]) -> str:
    slot, _, name = key.partition(".")
    return f"{slot}.{whole_name(name.removeprefix('front.'))}"


class _Forward(nn.Module):
    """A stage as DeepSpeed calls it."""

    def __init__(self, stage: Stage, autocast: Callable[[], Any]) -> None:
        super().__init__()
        self.stage, self._autocast = stage, autocast

    def forward(self, inputs: Any) -> Any:
        """See Stage."""
        with self._autocast():
            return self.stage(inputs)
