"""`lavis data`: check a recipe's datasets, and show what the model gets of them."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions below `lavis data`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    check = actions.add_parser("check", help="read every row and every image header; exit code 1 if there is a problem")
    check.set_defaults(act=_check)

    show = actions.add_parser("show", help="samples as the model gets them, with the supervised tokens marked")
    show.add_argument("-n", "--num", type=int, default=3, help="samples of each entry (default 3)")
    show.add_argument("--split", default="train", help="train, valid or test, or the split of an entry (default train)")
    show.set_defaults(act=_show)

    for action in (check, show):
        action.add_argument("recipe", help="file, or the name of a shipped recipe")
        action.add_argument("--options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides")


def run(args: argparse.Namespace) -> int:
    """Do the chosen action; 0, or 1 if `check` found a problem."""
    return args.act(args)


def _check(args: argparse.Namespace) -> int:
    from lavis.config.recipe import load_recipe
    from lavis.data.check import check_recipe, format_check

    problems = 0
    for check in check_recipe(load_recipe(args.recipe, args.options)):
        print(format_check(check), flush=True)
        problems += check.num_problems
    return 1 if problems else 0


def _show(args: argparse.Namespace) -> int:
    from rich.console import Console

    from lavis.config.recipe import load_recipe
    from lavis.data.show import LEGEND, show_samples

    console = Console(highlight=False, soft_wrap=True)  # no colour when the output is not a terminal
    console.print(LEGEND)
    for sample in show_samples(load_recipe(args.recipe, args.options), args.split, args.num):
        console.print(sample)
    return 0
