"""Training with DeepSpeed ZeRO."""

from __future__ import annotations

import importlib.util
import logging
import os
import sysconfig

from torch import nn

from lavis.config.recipe import Recipe
from lavis.core.errors import ConfigError
from lavis.core.registries import RUNNERS
from lavis.parallel.plan import Layout
from lavis.parallel.strategy import Strategy
from lavis.train.data import accumulation
from lavis.train.runner import RunnerBase

log = logging.getLogger(__name__)


@RUNNERS.register("deepspeed_runner")
class DeepSpeedRunner(RunnerBase):
    """RunnerBase with DeepSpeed's engine, as the recipe's `deepspeed_config` sets it up.

    Raises ConfigError where DeepSpeed is not installed.
    """

    always_grouped = True

    def __init__(self, recipe: Recipe) -> None:
        require_deepspeed(recipe)
        super().__init__(recipe)

    def _build_model(self) -> nn.Module:
        from lavis.parallel.zero import zero_stage

        if zero_stage(self.run_config) < 3 or self.run_config.evaluate:
            return super()._build_model()
        # no rank has room for it: DeepSpeed takes it from there
        return self.task.build_model(self.world.device, llm_on_cpu=True)

    def _layout(self) -> Layout:
        from lavis.parallel.zero import zero_stage

        return Layout(self.world.size, zero=zero_stage(self.run_config))

    def _build_strategy(self) -> Strategy:
        with self.world.local_main_first():
            build_operators()
        from lavis.parallel.zero import DeepSpeedStrategy

        return DeepSpeedStrategy(
            self.model, self.task, self.run_config, self.world, accumulation(self.run_config, self.world.size)
        )


def build_operators() -> None:
    """Compile what DeepSpeed compiles on a CPU at first use (about a minute, once on a machine): ranks that do so at
    the same time can crash.
    """
    from deepspeed.accelerator import get_accelerator

    builder = (
        get_accelerator().create_op_builder("ShareMemCommBuilder") if get_accelerator().device_name() == "cpu" else None
    )
    if builder and builder.is_compatible(verbose=False):
        builder.load(verbose=False)


def require_deepspeed(recipe: Recipe) -> None:
    """Raise ConfigError if DeepSpeed is missing; prepare the environment it looks at."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"{recipe.source}: run.runner {recipe.run.runner} needs DeepSpeed: pip install 'lavis[deepspeed]', or set"
            " run.runner=runner_base."
        )
    find_ninja()
    if recipe.run.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"


def find_ninja() -> None:
    """Put this environment's scripts on PATH, where DeepSpeed looks for ninja, also when the environment is not
    activated.
    """
    scripts = sysconfig.get_path("scripts")
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
