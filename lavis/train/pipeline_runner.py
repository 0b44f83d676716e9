"""Training over a DeepSpeed pipeline."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from lavis.config.recipe import Recipe
from lavis.core.dist import World
from lavis.core.errors import ConfigError
from lavis.core.registries import RUNNERS
from lavis.parallel.plan import Layout
from lavis.parallel.strategy import Strategy
from lavis.tokens.template import image_token_id
from lavis.train.data import accumulation
from lavis.train.runner import RunnerBase, parameter_counts
from lavis.train.zero_runner import build_operators, require_deepspeed

if TYPE_CHECKING:
    from lavis.models.stages import Part

log = logging.getLogger(__name__)


@RUNNERS.register("pipeline_runner")
class PipelineRunner(RunnerBase):
    """RunnerBase whose model lies in `run.num_stages` parts on as many ranks; more ranks are replicas of such
    pipelines.

    Raises ConfigError where the ranks are no multiple of the stages.
    """

    always_grouped = True

    def __init__(self, recipe: Recipe) -> None:
        require_deepspeed(recipe)
        super().__init__(recipe)

    def _split_world(self) -> World:
        stages, world = self.run_config.num_stages, self.world
        if world.size % stages:
            raise ConfigError(
                f"{world.size} ranks can't be pipelines of {stages} stages: start a multiple of run.num_stages"
                " (--num-stages)."
            )
        replicas = world.size // stages
        # DeepSpeed's own order: rank = stage x replicas + replica
        self.stage_index, replica = divmod(world.rank, replicas)
        groups = [[stage * replicas + r for r in range(replicas)] for stage in range(stages)]
        pipes = [[stage * replicas + r for stage in range(stages)] for r in range(replicas)]
        same_stage = [dist.new_group(ranks) for ranks in groups][self.stage_index]
        self.pipe_group = [dist.new_group(ranks) for ranks in pipes][replica]
        self.pipe_ranks = pipes[replica]
        return replace(world, rank=replica, size=replicas, group=same_stage, leads=world.is_main)

    def _sees(self) -> bool:
        return self.stage_index == 0

    def _cache_features(self, model: nn.Module) -> None:
        if self.stage_index == 0:
            super()._cache_features(model.stage.front)

    def _names(self, *, trained: bool) -> list[str]:
        own = [name for name, p in self.model.named_parameters() if p.requires_grad or not trained]
        return list(dict.fromkeys(name for names in self.world.gather(own) for name in names))

    def _count_parameters(self) -> tuple[int, int]:
        counts = self.world.sum(*parameter_counts(self.model))
        return tuple(round(n / self.data_world.size) for n in counts)

    def _build_model(self) -> nn.Module:
        from lavis.models.llm import frozen_dtype
        from lavis.models.parts import inits
        from lavis.models.stages import Stage, llm_part, load_part, open_llm_of
        from lavis.parallel.pipeline import StagedModel

        config: Any = self.recipe.model
        llm_config, tensors = open_llm_of(config.llm, self.task.tokenizer)
        trained, name = config.llm.train == "full", config.llm.weights or "model.llm.config"
        if llm_config.tie_word_embeddings and trained and self.run_config.num_stages > 1:
            raise ConfigError(
                f"{name} ties its embeddings to its head, which then lie on two ranks and can't be trained:"
                " set model.llm.train=lora or frozen."
            )
        part = self._parts(llm_config.num_hidden_layers)[self.stage_index]
        dtype = torch.float32 if trained else frozen_dtype(self.world.device)
        llm = llm_part(llm_config, part, dtype)
        load_part(llm, part, tensors, name, torch.device("cpu"))
        placeholder = image_token_id(self.task.tokenizer) if config.sees else None
        stage = Stage(config, llm, part, placeholder, inits(self.recipe.init))
        if part.is_first:
            stage.front.suit(self.world.device)
        stage.to(self.world.device)
        return StagedModel(stage, self.pipe_group, self.pipe_ranks, self.world.device)

    def _layout(self) -> Layout:
        return Layout(self.world.size, self.run_config.num_stages)

    def _parts(self, blocks: int) -> list[Part]:
        """The stages, by their cost or as the recipe says; printed as a table."""
        from lavis.models.stages import cut

        sizes, stages = self.run_config.stage_blocks, self.run_config.num_stages
        if sizes and (len(sizes) != stages or sum(sizes) != blocks or min(sizes) < 1):
            raise ConfigError(
                f"run.stage_blocks {sizes} must be {stages} numbers, one for each stage, at least 1, that sum to the"
                f" LLM's {blocks} blocks."
            )
        if self.run_config.evaluate:
            return cut(sizes or [blocks // stages + (i >= stages - blocks % stages) for i in range(stages)])
        return cut(self.world.broadcast(self._planned_sizes() if self.world.is_main else None))

    def _planned_sizes(self) -> list[int]:
        planner = self._planner()
        plan = planner.plan(self._layout(), blocks=self.run_config.stage_blocks or None)
        for i, (n, f, memory) in enumerate(zip(plan.blocks, plan.footprints, plan.memory, strict=True)):
            log.info(
                "stage %d of %d: %d blocks, %s parameters, %.3g GFLOP a micro-batch of the longest rows, "
                "%.2f GiB expected",
                i, len(plan.blocks), n, f"{round(f.parameters):,}", f.flops / 1e9, memory.total / 2**30,
            )  # fmt: skip
        return list(plan.blocks)

    def _build_strategy(self) -> Strategy:
        with self.world.local_main_first():
            build_operators()
        from lavis.parallel.pipeline import PipelineStrategy

        return PipelineStrategy(
            self.model,
            self.task,
            self.run_config,
            self.world,
            self.data_world,
            accumulation(self.run_config, self.data_world.size),
        )
