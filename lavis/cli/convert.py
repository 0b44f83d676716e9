"""`lavis convert`: checkpoints and weights of other programs into the files that this one and its like read."""

from __future__ import annotations

import argparse
from pathlib import Path

DEEPSPEED = {
    "deepspeed2pth": "model of a ZeRO checkpoint, to model.pth",
    "pipeline": "what a pipeline trained: projection, LoRA adapters or LLM (of the original's: --llm for the last)",
    "pipe_proj2pth": "projection of a pipeline checkpoint, to model.pth",
    "pipemodel2pth": "projection and LLM of a pipeline checkpoint, to unfreeze_llm_model.pth",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The conversions below `lavis convert`."""
    conversions = parser.add_subparsers(dest="conversion", required=True, metavar="CONVERSION")
    for name, text in DEEPSPEED.items():
        conversion = conversions.add_parser(name, help=text, description=text)
        conversion.add_argument(
            "--ckpt_dir",
            "--ckpt-dir",
            type=Path,
            required=True,
            help=(
                "folder of one step or epoch of the original, or a run or checkpoint of lavis; the result is written"
                " into it"
            ),
        )
        if name == "pipeline":
            conversion.add_argument(
                "--llm",
                action="store_true",
                help="the LLM as well, of a checkpoint of the original, which holds it also if it was frozen",
            )
    text = (
        "a first-generation Qwen folder, to a Qwen2 folder that transformers opens by itself (lavis itself needs no"
        " conversion)"
    )
    qwen1 = conversions.add_parser("qwen1", help=text, description=text)
    qwen1.add_argument("source", type=Path, help="folder with config.json, weights and qwen.tiktoken")
    qwen1.add_argument("target", type=Path, help="folder to write")
    qwen1.add_argument("--max-shard-size", default="2GB", help="largest weight file, such as 500MB (default 2GB)")


def run(args: argparse.Namespace) -> int:
    """Convert and print the files written; the exit code."""
    from lavis.core.logging import setup_logging

    setup_logging()
    for file in _convert(args):
        print(f"{file}  {file.stat().st_size / 1e6:.1f} MB")
    return 0


def _convert(args: argparse.Namespace) -> list[Path]:
    if args.conversion == "qwen1":
        from lavis.core.paths import resolve
        from lavis.export.qwen1_folder import convert_qwen1

        return convert_qwen1(resolve(args.source), args.target.absolute(), args.max_shard_size)
    from lavis.export import deepspeed
    from lavis.export.trained import export_peft, export_pth, open_run
    from lavis.runs.checkpoint import MARKER

    # our own, the same for every runner
    if (args.ckpt_dir / MARKER).exists() or (args.ckpt_dir / "checkpoints").is_dir():
        trained = open_run(args.ckpt_dir)
        names = trained.checkpoint.tensors()
        if args.conversion == "pipeline" and any(".lora_" in name for name in names):
            return export_peft(trained, args.ckpt_dir / "adapters")
        with_llm = args.conversion == "pipemodel2pth" or (
            args.conversion == "pipeline" and any(name.startswith("llm_model.") for name in names)
        )
        return [export_pth(trained, args.ckpt_dir / (deepspeed.LLM_FILE if with_llm else deepspeed.MODEL_FILE))]
    conversion = args.conversion
    if conversion == "pipeline":
        conversion = "pipemodel2pth" if args.llm else "pipe_proj2pth"
    return [getattr(deepspeed, conversion)(args.ckpt_dir)]
