"""`lavis export`: what a run trained, in the formats other tools read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `lavis export`."""
    parser.add_argument(
        "format",
        help="hf: the whole model, as a folder that transformers opens without lavis; pth: what was trained, as the"
        " original's model.pth; peft: LoRA adapters of the LLM, as a folder that peft opens; or that of a plug-in",
    )
    parser.add_argument(
        "run", help="folder of a run (its best checkpoint, else its last), or one of its checkpoints/step-N"
    )
    parser.add_argument("target", help="folder to write (for pth: or file ending in .pth)")
    whole = parser.add_argument_group("whole models (hf)")
    whole.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="type of all weights; auto, the default, keeps a frozen LLM's as its files have it and writes the rest in"
        " fp32",
    )
    whole.add_argument("--max-shard-size", help="largest weight file, such as 500MB (default: 5GB)")


def run(args: argparse.Namespace) -> int:
    """Export; the exit code."""
    from lavis.core.errors import ConfigError
    from lavis.core.logging import setup_logging
    from lavis.export.base import exporter_for
    from lavis.export.trained import open_run

    setup_logging()
    trained, target = open_run(args.run), Path(args.target)
    exporter = exporter_for(args.format, trained.model)
    if not exporter.whole and (args.dtype or args.max_shard_size):
        raise ConfigError(
            f"--dtype and --max-shard-size say how whole models are written: leave out for {args.format}."
        )
    precision: Any = args.dtype or "auto"
    files = exporter.write(trained, target, precision=precision, max_shard_size=args.max_shard_size or "5GB").files
    print(f"{trained.checkpoint.path} ->")
    for file in files:
        print(f"  {file}  {file.stat().st_size / 1e6:.1f} MB")
    return 0
