"""`lavis train`, also behind train.py."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of train.py."""
    add_recipe_arguments(parser)
    parser.add_argument(
        "--num-stages",
        type=int,
        metavar="N",
        help="train over a pipeline of N stages: short for --options parallel.strategy=pipeline parallel.num_stages=N",
    )
    parser.add_argument("--llm-grad-ckpt", action="store_true", help="short for --options model.llm.recompute=true")
    parser.add_argument("--use-deepspeed", action="store_true", help="short for --options parallel.strategy=zero")


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that reads a recipe and may be started by torchrun."""
    recipe_help = "recipe file, or the name of a shipped one (see: lavis configs list)"
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help=recipe_help)
    parser.add_argument("--cfg-path", metavar="RECIPE", help="the same as a flag, as the original's scripts take it")
    options_help = "values that override the recipe: run.seed=7"
    parser.add_argument("--options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=options_help)
    # some launchers pass the rank as a flag; the environment they set is what counts
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)


def named_recipe(args: argparse.Namespace) -> str:
    """The recipe on the command line. Raises ConfigError unless there is exactly one."""
    from lavis.core.errors import ConfigError

    if (args.recipe is None) == (args.cfg_path is None):
        raise ConfigError("name one recipe: lavis train shapes/align, or --cfg-path FILE (see: lavis configs list).")
    return args.recipe or args.cfg_path


def run(args: argparse.Namespace) -> int:
    """Train; the exit code of the run."""
    from lavis.config.recipe import load_recipe
    from lavis.core.logging import setup_logging

    setup_logging()
    options = [*args.options, *(["parallel.strategy=zero"] if args.use_deepspeed else [])]
    options += (
        ["parallel.strategy=pipeline", f"parallel.num_stages={args.num_stages}"] if args.num_stages is not None else []
    )
    options += ["model.llm.recompute=true"] if args.llm_grad_ckpt else []
    recipe = load_recipe(named_recipe(args), options)

    from lavis.train import train_recipe

    return train_recipe(recipe)
