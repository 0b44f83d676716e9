"""`lavis shapes`: the small world's frozen parts, rebuilt from nothing by the same train.py that trains everything
else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

CHAIN: dict[str, tuple[str, ...]] = {
    "tokenizer_a": (),
    "tokenizer_b": (),
    "llm_a": ("tokenizer_a",),
    "stage1": ("tokenizer_a",),
    "llm_b": ("tokenizer_b",),
    "stage2": ("llm_a", "stage1"),
}
"""Recipe in lavis/projects/shapes to the recipes it stands on. `align` then needs stage2 and llm_b."""
SHIPPED = ("llm_a", "llm_b", "tower")
"""Folders under cache/shapes that are shipped with the package."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `lavis shapes`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="build|ship")
    build = actions.add_parser(
        "build", help="train tokenizers, LLMs and vision tower into cache/shapes, which then takes precedence"
    )
    build.add_argument(
        "--jobs",
        type=int,
        default=2,
        help=(
            "recipes trained side by side, one thread each (the last one, which waits for all others, has as many"
            " threads)"
        ),
    )
    build.add_argument("--only", nargs="+", choices=list(CHAIN), help="these recipes alone")
    ship = actions.add_parser(
        "ship", help="copy what was built into lavis/assets, as the parts shipped with the package"
    )
    ship.add_argument(
        "--aligned", metavar="RUN", help="a run of shapes/align, whose projection is shipped for chatting"
    )


def run(args: argparse.Namespace) -> int:
    """Build or ship; the exit code."""
    return _ship(args.aligned) if args.action == "ship" else _build(args.jobs, args.only or list(CHAIN))


def _build(jobs: int, names: list[str]) -> int:
    from lavis.config.recipe import load_recipe
    from lavis.core.logging import setup_logging
    from lavis.data.assemble import portions

    setup_logging()
    for portion in portions(load_recipe("shapes/align")):
        portion.source.files()  # draws the pictures, before two recipes want them at once
    logs = Path("output/shapes/logs")
    logs.mkdir(parents=True, exist_ok=True)
    futures: dict[str, Future[None]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for name in names:  # CHAIN is in an order in which what is waited for was submitted before
            before = [futures[n] for n in CHAIN[name] if n in futures]
            futures[name] = pool.submit(_train, name, before, logs, threads=jobs if name == names[-1] else 1)
    for future in futures.values():
        future.result()
    return 0


def _train(name: str, before: list[Future[None]], logs: Path, threads: int) -> None:
    from lavis.core.errors import TrainingError

    for future in before:
        future.result()
    started = time.perf_counter()
    log = logs / f"{name}.txt"
    print(f"{name}: training, see {log}", flush=True)
    with log.open("w") as out:
        code = subprocess.call(
            [sys.executable, "-m", "lavis", "train", "--cfg-path", f"shapes/{name}"],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))},
        )
    if code:
        raise TrainingError(f"shapes/{name} ended with exit code {code}; the end of {log} says why.")
    print(f"{name}: done in {time.perf_counter() - started:.0f} s", flush=True)


def _ship(aligned: str | None) -> int:
    from lavis.core.errors import CheckpointError
    from lavis.core.paths import ASSETS_ROOT, cache_root

    if aligned:
        from lavis.export.trained import open_run

        file = open_run(aligned).checkpoint.path / "trainable.safetensors"
        shutil.copyfile(file, ASSETS_ROOT / "shapes/aligned/projection.safetensors")
    for name in SHIPPED:
        source, target = cache_root() / "shapes" / name, ASSETS_ROOT / "shapes" / name
        if not source.is_dir():
            raise CheckpointError(f"{source} is missing: run `lavis shapes build` first.")
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    size = sum(f.stat().st_size for f in (ASSETS_ROOT / "shapes").rglob("*") if f.is_file())
    print(f"{ASSETS_ROOT / 'shapes'}: {size / 1e6:.1f} MB")
    return 0
