"""`lavis configs`: list, copy, show and check recipes, and write their reference page."""

from __future__ import annotations

import argparse
import fnmatch
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavis.config.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions below `lavis configs`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    listing = actions.add_parser("list", help="the recipes shipped with the package")
    listing.add_argument("pattern", nargs="?", default="*", help="shell pattern of names, such as 'shapes/*'")
    listing.set_defaults(act=_list)

    copy = actions.add_parser("copy", help="copy a shipped recipe, to start from")
    copy.add_argument("name", help="name as `list` prints it, or a file")
    copy.add_argument("destination", type=Path, help="file or folder")
    copy.add_argument("--force", action="store_true", help="overwrite")
    copy.set_defaults(act=_copy)

    show = actions.add_parser("show", help="the resolved recipe, with where each value comes from")
    show.add_argument("recipe", help="file or name")
    show.add_argument("--options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides")
    show.add_argument("--origins", action=argparse.BooleanOptionalAction, default=True, help="where values are from")
    show.set_defaults(act=_show)

    check = actions.add_parser("check", help="validate recipes")
    check.add_argument("recipes", nargs="+", metavar="RECIPE", help="file or name")
    check.add_argument("--options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides")
    check.set_defaults(act=_check)

    doc = actions.add_parser("doc", help="write the reference of all recipe keys")
    doc.add_argument("--output", type=Path, default=Path("docs/recipes.md"), help="Markdown file")
    doc.set_defaults(act=_doc)


def run(args: argparse.Namespace) -> int:
    """Do the chosen action; 0, or 2 if `check` found a wrong recipe."""
    return args.act(args)


def _list(args: argparse.Namespace) -> int:
    from lavis.config.recipe import shipped_recipes

    recipes = {name: path for name, path in shipped_recipes().items() if fnmatch.fnmatch(name, args.pattern)}
    width = max(map(len, recipes), default=0)
    for name, path in recipes.items():
        print(f"{name:{width}}  {first_comment(path)}")
    if not recipes:
        print(f"no shipped recipe matches {args.pattern!r}")
    return 0


def first_comment(path: Path) -> str:
    """The first comment line of a YAML file, which says what the recipe is for."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#")), "")


def _copy(args: argparse.Namespace) -> int:
    from lavis.config.shipped import find_recipe, movable_text
    from lavis.core.errors import ConfigError

    source = find_recipe(args.name)
    text = movable_text(source)
    target = args.destination / source.name if args.destination.is_dir() else args.destination
    if target.exists() and not args.force:
        raise ConfigError(f"{target} exists: choose another name, or overwrite it with --force.")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    print(target)
    return 0


def _show(args: argparse.Namespace) -> int:
    from lavis.config.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.options)
    print(annotated_yaml(recipe) if args.origins else recipe.to_yaml(), end="")
    return 0


def annotated_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML with `# from ...` behind every value."""
    lines: list[str] = []

    def write(values: dict[str, Any], key: str, indent: str) -> None:
        for name, value in values.items():
            dotted = f"{key}{name}"
            if isinstance(value, dict) and value:
                lines.append(f"{indent}{name}:")
                write(value, f"{dotted}.", indent + "  ")
            else:
                shown = json.dumps(value, ensure_ascii=False)  # JSON is YAML on one line
                lines.append(f"{indent}{name}: {shown}  # from {recipe.place(dotted)}")

    write(recipe.to_dict(), "", "")
    return "\n".join(lines) + "\n"


def _check(args: argparse.Namespace) -> int:
    from lavis.config.recipe import load_recipe, missing_files
    from lavis.core.errors import ConfigError

    wrong = 0
    for name in args.recipes:
        try:
            recipe = load_recipe(name, args.options)
        except ConfigError as e:
            wrong += 1
            print(f"{name}: wrong\nerror: {e}")
            continue
        print(f"{name}: valid")
        missing = missing_files(recipe)
        for key, path in missing:
            print(f"  not there, or incomplete: {path} ({key})")
        if missing:
            print(f"  `lavis weights {name}` says where they come from")
    return ConfigError.exit_code if wrong else 0


def _doc(args: argparse.Namespace) -> int:
    from lavis.config.doc import recipes_markdown

    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(recipes_markdown(), encoding="utf-8")
    print(args.output)
    return 0
