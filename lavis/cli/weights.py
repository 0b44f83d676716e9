"""`lavis weights`: the files that a recipe needs, whether they are there, and where they come from."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lavis.config.files import NeededFile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `lavis weights`."""
    parser.add_argument("recipe", help="file, or the name of a shipped recipe")
    parser.add_argument("--options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides")
    parser.add_argument("--download", action="store_true", help="fetch what is missing and has a known address")


def run(args: argparse.Namespace) -> int:
    """List the files; 0, or 1 if one is missing (with --download: still missing)."""
    from lavis.config.files import needed_files
    from lavis.config.recipe import load_recipe
    from lavis.weights.sources import location, source_of

    files = needed_files(load_recipe(args.recipe, args.options))
    if args.download:
        _download(files)
    places = [location(file) for file in files]
    for file, place in zip(files, places, strict=True):
        print("\n".join(_lines(file, place)))
    missing = [file for file, place in zip(files, places, strict=True) if place is None]
    fetchable = 0 if args.download else sum(source_of(file) is not None for file in missing)
    hint = f"; `lavis weights {args.recipe} --download` fetches {fetchable} of them" if fetchable else ""
    print(f"{len(missing)} of {len(files)} missing{hint}")
    return 1 if missing else 0


def _lines(file: NeededFile, place: Path | None) -> list[str]:
    """What is said of a file: its state, size, place and key; if it is not there, also how to get it."""
    from lavis.config.files import MADE_HERE
    from lavis.weights.download import human_size
    from lavis.weights.sources import source_of

    if place:
        return [f"present  {human_size(_size(place)):>8}  {_shown(place)}  ({file.key})"]
    source, path = source_of(file), file.path and _shown(file.path)
    state = "partial" if path and path.exists() else "missing"
    about = f"~{human_size(source.size)}" if source and source.size else ""
    if source:
        get = source.command(path)
    else:
        get = (
            "lavis shapes build"
            if file.name.startswith(MADE_HERE)
            else "no address is known: put it there, or change the key"
        )
    return [f"{state}  {about:>8}  {path or file.name + ' on the Hugging Face hub'}  ({file.key})", f"    {get}"]


def _download(files: list[NeededFile]) -> None:
    """Fetch what is missing; what can't be fetched is said on stderr, and the next one is tried."""
    from lavis.core.errors import LavisError
    from lavis.weights.sources import location, source_of

    for file in files:
        source = source_of(file)
        if source is None or location(file):
            continue
        print(f"fetching {_shown(file.path) if file.path else file.name}", file=sys.stderr)
        try:
            source.fetch(file.path)
        except LavisError as error:
            print(f"error: {error}", file=sys.stderr)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _shown(path: Path) -> Path:
    """`path`, relative to the working directory if it is below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
