"""`lavis evaluate`, also behind evaluate.py."""

from __future__ import annotations

import argparse

from lavis.cli.train import add_recipe_arguments, named_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of evaluate.py."""
    add_recipe_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate the recipe's test splits; the exit code of the run."""
    from lavis.config.recipe import load_recipe
    from lavis.core.logging import setup_logging

    setup_logging()
    recipe = load_recipe(named_recipe(args), [*args.options, "run.evaluate=true"])

    from lavis.train import train_recipe

    return train_recipe(recipe)
