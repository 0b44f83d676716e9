"""`lavis export`: what a run trained, in the formats other tools read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `lavis export`."""
    formats = parser.add_subparsers(dest="format", required=True, metavar="hf|pth|peft")
    hf = formats.add_parser("hf", help="the whole model, as a folder that transformers opens without lavis")
    hf.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="type of all weights; auto keeps a frozen LLM's as its files have them and writes the rest in fp32",
    )
    hf.add_argument("--max-shard-size", default="5GB", help="largest weight file, such as 500MB")
    pth = formats.add_parser("pth", help="what was trained, as the original's model.pth")
    peft = formats.add_parser("peft", help="LoRA adapters of the LLM, as a folder that peft opens")
    for command in (hf, pth, peft):
        command.add_argument(
            "run", help="folder of a run (its best checkpoint, else its last), or one of its checkpoints/step-N"
        )
        command.add_argument("target", help="folder to write (for pth: or file ending in .pth)")


def run(args: argparse.Namespace) -> int:
    """Export; the exit code."""
    from lavis.core.logging import setup_logging
    from lavis.export.base import exporter_for
    from lavis.export.trained import open_run

    setup_logging()
    trained, target = open_run(args.run), Path(args.target)
    exporter = exporter_for(args.format, trained.model)
    precision: Any = getattr(args, "dtype", "auto")
    size = getattr(args, "max_shard_size", "5GB")
    files = exporter.write(trained, target, precision=precision, max_shard_size=size).files
    print(f"{trained.checkpoint.path} ->")
    for file in files:
        print(f"  {file}  {file.stat().st_size / 1e6:.1f} MB")
    return 0
