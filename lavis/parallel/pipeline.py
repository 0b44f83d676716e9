"""An optimiser step by DeepSpeed's pipeline engine: one layer of it is one of our stages."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import GenerationConfig

from lavis.config.init import inits
from lavis.config.recipe import Recipe
from lavis.core.dist import World
from lavis.core.errors import ConfigError
from lavis.core.paths import resolve
from lavis.core.registries import STRATEGIES
from lavis.core.types import Batch
from lavis.models.attention import are_packed, flat, in_rows, places, prepared, runs_of
from lavis.models.llm import frozen_dtype
from lavis.models.stages import Part, Stage, cut, llm_part, load_part, open_llm_of
from lavis.objectives.base import Objective
from lavis.objectives.learner import Learner
from lavis.parallel.deepspeed_setup import build_operators, require_deepspeed
from lavis.parallel.layout import Layout
from lavis.parallel.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors, set_learning_rate
from lavis.parallel.results import LossSums, StepResult
from lavis.parallel.staged import Autocast, StagedLearner
from lavis.parallel.strategy import Ranks, Strategy, Tensors
from lavis.parallel.zero import engine_config
from lavis.tokens.template import image_token_id

if TYPE_CHECKING:
    from lavis.parallel.plan import Planner

log = logging.getLogger(__name__)


@STRATEGIES.register("pipeline")
class Pipeline(Strategy):
    """The model lies in `parallel.num_stages` stages on as many ranks, micro-batches one behind the other; more ranks
    are replicas of such pipelines.

    Loss, gradient and checkpoints are those of DataParallel.
    """

    grouped = True
    learner: StagedLearner

    def __init__(self, learner: Learner, recipe: Recipe, ranks: Ranks, accumulation: int) -> None:
        learner = StagedLearner(learner.model, learner.objective, ranks, self.autocast)
        super().__init__(learner, recipe, ranks, accumulation)
        with self.world.local_main_first():
            build_operators()
        self.replicas, self.stage = ranks.data, learner.model
        self.optimizer = build_optimizer(self.stage, self.recipe.optim, fused=ranks.world.device.type == "cuda")
        self.engine = _engine(self.stage, self.optimizer, self.autocast, self._loss, self.recipe, accumulation)
        # The engine clips by the norm of its own stage, and updates in the same call that runs the micro-batches. The
        # only place between the two is the optimiser's hook.
        self.optimizer.register_step_pre_hook(self._before_update)
        self.batches: list[Batch] = []
        self.total: float | torch.Tensor = 1.0
        self.sums, self.number, self.report = LossSums(learner.objective, 1.0), 0, True
        self.result: StepResult | None = None

    @classmethod
    def require(cls, recipe: Recipe) -> None:
        """See Strategy: DeepSpeed."""
        require_deepspeed(recipe)

    @classmethod
    def split(cls, recipe: Recipe, world: World) -> Ranks:
        """See Strategy. Raises ConfigError where the ranks are no multiple of the stages."""
        stages = recipe.parallel.num_stages
        if world.size % stages:
            raise ConfigError(
                f"{world.size} ranks can't be pipelines of {stages} stages: start a multiple of parallel.num_stages"
                " (--num-stages)."
            )
        replicas = world.size // stages
        # DeepSpeed's own order: rank = stage x replicas + replica
        index, replica = divmod(world.rank, replicas)
        groups = [[stage * replicas + r for r in range(replicas)] for stage in range(stages)]
        pipes = [[stage * replicas + r for stage in range(stages)] for r in range(replicas)]
        same_stage = [_group(ranks) for ranks in groups][index]
        pipe_group = [_group(ranks) for ranks in pipes][replica]
        data = replace(world, rank=replica, size=replicas, group=same_stage, leads=world.is_main)
        return Ranks(world, data, index, tuple(pipes[replica]), pipe_group)

    @classmethod
    def layout(cls, recipe: Recipe, world: World) -> Layout:
        return Layout(world.size, recipe.parallel.num_stages)

    @classmethod
    def build(
        cls, recipe: Recipe, tokenizer: Any, objective: Objective, ranks: Ranks, planner: Callable[[], Planner]
    ) -> Learner:
        """See Strategy: one stage. This host never holds the other blocks."""
        config: Any = recipe.model
        device = ranks.world.device
        llm_config, tensors = open_llm_of(config.llm, tokenizer)
        trained, name = config.llm.train == "full", config.llm.weights or "model.llm.config"
        if llm_config.tie_word_embeddings and trained and recipe.parallel.num_stages > 1:
            raise ConfigError(
                f"{name} ties its embeddings to its head, which then lie on two ranks and can't be trained: set"
                " model.llm.train=lora or frozen."
            )
        part = _parts(recipe, llm_config.num_hidden_layers, ranks.world, planner)[ranks.stage]
        llm = llm_part(llm_config, part, torch.float32 if trained else frozen_dtype(device))
        llm.generation_config = _recommended(config.llm.weights)
        load_part(llm, part, tensors, name, torch.device("cpu"))
        placeholder = image_token_id(tokenizer) if config.sees else None
        stage = Stage(config, llm, part, placeholder, inits(recipe.init))
        if part.is_first:
            stage.front.suit(device)
        return StagedLearner(stage.to(device), objective, ranks)

    def step(self, batches: list[Batch], rate: float, number: int, *, report: bool = True) -> StepResult | None:
        """See Strategy. The error comes before anything is saved."""
        self.batches, self.number, self.report = batches, number, report
        with self.clock("comm"):
            self.total = self.units(batches)
        self.sums = LossSums(self.learner.objective, self.total)
        set_learning_rate(self.optimizer, rate)
        self.engine.train_batch(map(self._micro_batch, range(len(batches))))
        return self.result

    def _micro_batch(self, index: int) -> tuple[Any, torch.Tensor]:
        """(what the first stage takes, what the loss takes). The engine hands on nothing but tensors: the loss finds
        its batch by the index.
        """
        batch = self.batches[index]
        if self.ranks.sees:
            batch = self.stage.front.filler(batch)
        images = batch.pixel_values if batch.features is None else batch.features
        images = torch.empty(0) if images is None else images
        ids, positions = batch.input_ids, batch.position_ids
        if self._end_to_end(batch):
            where = self._places(batch)
            ids, positions = flat(ids, where), flat(positions, where)
        return (ids, positions, images), torch.tensor(index)

    def _end_to_end(self, batch: Batch) -> bool:
        """Whether the samples of `batch` go through the stages without its padding; see hidden_states."""
        runs = batch.known.runs or runs_of(batch.position_ids)
        return prepared(self.stage.llm) and (are_packed(runs) or not self.stage.config.llm.drops_out)

    def _places(self, batch: Batch) -> torch.Tensor | None:
        """Where samples are in the rows of `batch`, which go through the stages end to end."""
        return places(batch.known.runs or runs_of(batch.position_ids), batch.input_ids.shape[1], batch.input_ids.device)

    def _loss(self, hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        batch = self.learner.ready(self.batches[int(index)])
        if self._end_to_end(batch):
            rows, width = batch.input_ids.shape
            hidden = in_rows(hidden, self._places(batch), (rows, width))
        with self.autocast():
            out = self.learner.objective.loss(self.learner.scorer(), hidden, batch)
        # in fp64: one rank sums all micro-batches here, and as tensors, so that no one waits for them
        self.sums.add(replace(out, loss_sum=out.loss_sum.double()))
        # DeepSpeed takes the mean over micro-batches and replicas
        return out.loss_sum / self.total * self.accumulation * self.replicas.size

    def _before_update(self, *_: object) -> None:
        """The optimiser's hook: all gradients are summed, nothing is updated yet."""
        own = [p.grad for _, p in self._trained() if p.grad is not None]
        square = torch.zeros((), dtype=self.world.exact, device=self.world.device)
        if own:
            square += torch.nn.utils.get_total_norm(own).to(square.dtype) ** 2
        with self.clock("comm"):
            norm = (self.world.total(square) / self.replicas.size).sqrt()
        self.results.add(self.number, self.sums, norm)
        self.result = self.reported(self.report)
        limit = self.recipe.optim.max_grad_norm
        if limit is not None and own:
            torch.nn.utils.clip_grads_with_norm_([p for _, p in self._trained()], limit, norm.float())

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.learner.tensors().items() if p.requires_grad]

    def trained_tensors(self) -> Tensors:
        """See Strategy; collected from the stages."""
        return self._collected({name: p.detach().cpu() for name, p in self._trained()})

    def state_tensors(self) -> Tensors:
        """See Strategy; collected from the stages."""
        state = optimizer_tensors(self.optimizer, self.stage)
        own = self._whole_names()
        return self._collected({_renamed(key, own): value.cpu() for key, value in state.items() if _name(key) in own})

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
        names = {whole: own for own, whole in self._whole_names().items()}
        own = {_renamed(key, names): value for key, value in tensors.items() if _name(key) in names}
        load_optimizer_tensors(self.optimizer, self.stage, own)

    def _whole_names(self) -> dict[str, str]:
        """Name in the stage to name in the whole model, of what is trained."""
        whole = {p: name for name, p in self._trained()}
        return {name: whole[p] for name, p in self.stage.named_parameters() if p in whole}


def _group(ranks: list[int]) -> Any:
    """A process group, which all ranks make together, also those that are not in it."""
    return dist.new_group(ranks)


def _name(key: str) -> str:
    return key.partition(".")[2]


def _renamed(key: str, names: dict[str, str]) -> str:
    return f"{key.partition('.')[0]}.{names[_name(key)]}"


def _engine(
    stage: Stage, optimizer: torch.optim.Optimizer, autocast: Autocast, loss: Any, recipe: Recipe, accumulation: int
) -> Any:
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # joins the group that is there
    staged = PipelineModule(
        layers=[LayerSpec(_Forward, stage, autocast) for _ in range(stage.part.count)],
        num_stages=stage.part.count,
        loss_fn=loss,
        partition_method="uniform",
        activation_checkpoint_interval=0,  # blocks recompute themselves, by model.llm.recompute
        seed_layers=False,  # seeds are those of the run, the same under every strategy
        dynamic_shape=True,  # rows are padded to the longest of their micro-batch
    )
    config = engine_config(recipe, None, accumulation)
    # the norm is that of all stages, and clipped by our hook
    config |= {"gradient_clipping": 0.0, "zero_optimization": {"stage": 0}}
    engine, *_ = deepspeed.initialize(model=staged, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


class _Forward(nn.Module):
    """A stage as DeepSpeed calls it."""

    def __init__(self, stage: Stage, autocast: Autocast) -> None:
        super().__init__()
        self.stage, self._autocast = stage, autocast

    def forward(self, inputs: Any) -> Any:
        with self._autocast():
            return self.stage(inputs)


def _parts(recipe: Recipe, blocks: int, world: World, planner: Callable[[], Planner]) -> list[Part]:
    """The stages, by their cost or as the recipe says; printed as a table."""
    sizes, stages = recipe.parallel.stage_blocks, recipe.parallel.num_stages
    if sizes and (len(sizes) != stages or sum(sizes) != blocks or min(sizes) < 1):
        raise ConfigError(
            f"parallel.stage_blocks {sizes} must be {stages} numbers, one for each stage, at least 1, that sum to the"
            f" LLM's {blocks} blocks."
        )
    if recipe.run.evaluate:
        return cut(sizes or [blocks // stages + (i >= stages - blocks % stages) for i in range(stages)])
    return cut(world.broadcast(_planned_sizes(recipe, world, planner()) if world.is_main else None))


def _planned_sizes(recipe: Recipe, world: World, planner: Planner) -> list[int]:
    plan = planner.plan(Pipeline.layout(recipe, world), blocks=recipe.parallel.stage_blocks or None)
    for i, (n, f, memory) in enumerate(zip(plan.blocks, plan.footprints, plan.memory, strict=True)):
        log.info(
            "stage %d of %d: %d blocks, %s parameters, %.3g GFLOP a micro-batch of the longest rows, "
            "%.2f GiB expected",
            i, len(plan.blocks), n, f"{round(f.parameters):,}", f.flops / 1e9, memory.total / 2**30,
        )  # fmt: skip
    return list(plan.blocks)


def _recommended(name: str | None) -> GenerationConfig:
    """The generation settings that come with the LLM `name`, which a stage, made from the configuration, lacks."""
    if name is None:
        return GenerationConfig()
    folder = resolve(name)
    try:
        return GenerationConfig.from_pretrained(folder if folder.exists() else name)
    except OSError:  # many come without
        return GenerationConfig()
