"""What DeepSpeed needs before it is imported, and what it compiles."""

from __future__ import annotations

import importlib.util
import os
import sysconfig

from lavis.config.recipe import Recipe
from lavis.core.errors import ConfigError


def require_deepspeed(recipe: Recipe) -> None:
    """Raise ConfigError if DeepSpeed is missing; prepare the environment it looks at."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"{recipe.source}: parallel.strategy {recipe.parallel.strategy} needs DeepSpeed: pip install"
            " 'lavis[deepspeed]', or set it to data_parallel."
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
