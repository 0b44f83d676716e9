"""The flags by which every way to chat names its model."""

from __future__ import annotations

import argparse
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lavis.generation.model import ChatModel

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Addresses that only this machine reaches."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that `open_chat` reads, and the seed."""
    parser.add_argument(
        "--run", metavar="FOLDER", help="folder of a run, or one of its checkpoints: nothing else is needed"
    )
    parser.add_argument(
        "-c",
        "--checkpoint-path",
        metavar="PATH",
        help="trained projection (model.pth), or a folder that `lavis export` wrote",
    )
    parser.add_argument(
        "--model-type",
        metavar="NAME",
        help="model that a projection belongs to: qwen7b_chat (default), qwen14b_chat, shapes, ...",
    )
    parser.add_argument("--cpu-only", action="store_true", help="use no GPU")
    parser.add_argument("--gpu_id", "--gpu-id", type=int, default=0, metavar="N", help="which GPU (default 0)")
    parser.add_argument(
        "--llm_device_map",
        "--llm-device-map",
        choices=("cpu", "auto"),
        help="keep the LLM on the CPU, or spread it over all GPUs",
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="type of the LLM's weights (default: what suits the device)"
    )
    parser.add_argument(
        "--options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="overrides of the model section, with --model-type",
    )
    parser.add_argument("-s", "--seed", type=int, default=42, help="of drawn answers (default 42)")


def open_chat(args: argparse.Namespace) -> ChatModel:
    """The model that the flags name. Raises ConfigError, ChatError or CheckpointError if there is none."""
    import torch

    from lavis.core.errors import ConfigError
    from lavis.serve.load import load_chat

    cuda = torch.cuda.is_available() and not args.cpu_only
    if cuda:
        if not 0 <= args.gpu_id < torch.cuda.device_count():
            raise ConfigError(f"--gpu_id {args.gpu_id}: this machine has GPUs 0 to {torch.cuda.device_count() - 1}.")
        torch.cuda.set_device(args.gpu_id)  # where a library asks for no device, as bitsandbytes does
    return load_chat(
        run=args.run,
        checkpoint=args.checkpoint_path,
        model_type=args.model_type,
        device=torch.device("cuda", args.gpu_id) if cuda else "cpu",
        llm_device_map="cpu" if args.cpu_only and args.llm_device_map else args.llm_device_map,
        dtype=args.dtype,
        options=args.options,
    )


def check_address(host: str, port: int) -> None:
    """Before a large model is loaded for nothing. Raises ConfigError if nothing can listen there."""
    from lavis.core.errors import ConfigError

    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as e:
        raise ConfigError(f"nothing can listen on {host}:{port} ({e}): give another --host or --port.") from e
