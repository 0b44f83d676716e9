"""The place of DeepSpeed ZeRO among the runners."""

from __future__ import annotations

from lavis.common.config import Recipe
from lavis.common.errors import ConfigError
from lavis.common.registries import RUNNERS


@RUNNERS.register("deepspeed_runner")
class DeepSpeedRunner:
    """Refuses: recipes of the original that name it are read and checked, but this version trains without DeepSpeed."""

    def __init__(self, recipe: Recipe) -> None:
        raise ConfigError(
            f"{recipe.source}: run.runner is deepspeed_runner, which this version does not have. "
            "Set run.runner=runner_base (and leave --use-deepspeed out): it trains data-parallel with the same loss."
        )
